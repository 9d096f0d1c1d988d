"""What to ask a cluster for: checked before anything is written."""

import re
from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True)
class SlurmRequest:
    """One submission."""

    nodes: int
    """Nodes to run on; the most of them when `min_nodes` is set."""
    gpus_per_node: int
    """0: a CPU job."""
    tasks_per_node: int = 0
    """Processes per node; 0: one per GPU, or one on a CPU node."""
    min_nodes: int = 0
    """Fewest nodes that will do; 0: `nodes`. The run goes on with as many as there are and its layout allows."""
    spares: int = 0
    """Nodes to ask for besides, which take the place of those that fail."""
    partition: str = ""
    account: str = ""
    time: str = "24:00:00"
    """SLURM's time limit, such as 24:00:00 or 7-00:00:00."""
    job_name: str = ""
    """The run folder's name when empty."""
    container: str = ""
    """Image to run in; none when empty."""
    save_seconds: int = 120
    """How long before the time limit the run is asked to save and leave."""
    chain: int = 1
    """Jobs to submit at once, each to begin when the one before has ended."""
    max_failures: int = 3
    """Failures in a row without a new checkpoint after which the run is given up."""
    max_same_step: int = 2
    """Failures after the very same step after which it is given up."""

    @property
    def processes_per_node(self) -> int:
        """Processes that srun starts on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def fewest_nodes(self) -> int:
        """Fewest nodes to run on."""
        return self.min_nodes or self.nodes


def check_request(request: SlurmRequest) -> None:
    """Raises ConfigError naming the option that cannot be used."""
    for option, number, least in (
        ("--nodes", request.fewest_nodes, 1),
        ("--gpus-per-node", request.gpus_per_node, 0),
        ("--tasks-per-node", request.tasks_per_node, 0),
        ("--spares", request.spares, 0),
        ("--save-seconds", request.save_seconds, 1),
        ("--chain", request.chain, 1),
        ("--max-failures", request.max_failures, 0),
        ("--max-same-step", request.max_same_step, 1),
    ):
        if number < least:
            raise ConfigError(f"{option}: at least {least}, got {number}")
    if request.fewest_nodes > request.nodes:
        raise ConfigError(f"--nodes {request.fewest_nodes}-{request.nodes}: write the smaller number first")
    if request.save_seconds > 65535:
        raise ConfigError(f"--save-seconds {request.save_seconds}: SLURM takes 65535 at most")
    if request.gpus_per_node and request.tasks_per_node not in (0, request.gpus_per_node):
        raise ConfigError(
            f"--tasks-per-node {request.tasks_per_node}: there is one process per GPU; leave it out, or set "
            "--gpus-per-node 0 for a CPU cluster"
        )
    if not re.fullmatch(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", request.time):
        raise ConfigError(f"--time {request.time!r}: write minutes, HH:MM:SS or D-HH:MM:SS")
    for option, text in (
        ("--partition", request.partition),
        ("--account", request.account),
        ("--job-name", request.job_name),
        ("--container", request.container),
    ):
        refuse_control_characters(option, text)


def refuse_control_characters(name: str, text: str) -> None:
    """Raises ConfigError for text that cannot stand on one line."""
    if any(not character.isprintable() for character in text):
        raise ConfigError(f"{name} {text!r}: control characters and line breaks cannot stand in a job script")
