"""What a cluster wants that a run does not know: the `--site` file.

account: mill-team                                       # of --account; partition likewise
partition: gpu
sbatch: {exclusive: true, mem: 0, cpus-per-task: 12}     # further #SBATCH options
environment: {NCCL_SOCKET_IFNAME: ib0}
modules: [cuda/12.8]                                     # module load
setup: [ulimit -l unlimited]                             # shell lines before the first process starts
network_interface: ib0                                   # NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME
nccl: {IB_HCA: mlx5, DEBUG: WARN}                        # NCCL_IB_HCA, NCCL_DEBUG
container_runtime: apptainer
preflight: {min_free_gb: 500, commands: ["test -d /scratch"]}
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from data_scheduler.config import StrictModel
from headrace.validation import validated
from headrace.yaml_file import read_yaml

OWN_OPTIONS = frozenset(
    {"account", "array", "dependency", "error", "gpus", "gpus-per-node", "gres", "job-name", "mincpus", "nodes"}
    | {"no-kill", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "requeue", "signal", "time", "wrap"}
)
"""sbatch options the launcher sets from its own arguments, or that would break the script."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Preflight(StrictModel):
    """What every node is asked before any process starts."""

    enabled: bool = True
    """Ask at all. GPUs, their memory errors and clocks, the kernel's log, data paths, the run folder."""
    min_free_gb: float = 1.0
    """Room that the run folder's disk must have."""
    max_clock_skew_s: float = 30.0
    """How far a node's clock may be off the others'. Nodes that start their check late look late; so not too small."""
    min_allreduce_gb_per_s: float = 0.0
    """Bus bandwidth of an all-reduce between a node and its neighbours; 0: not measured (it starts torch once more)."""
    commands: list[str] = Field(default=[])
    """Shell commands that exit with 0 on a good node; what they print is the reason."""
    timeout_s: int = Field(default=300, ge=1)
    """A node that has not answered by then is bad."""


class Site(StrictModel):
    """One cluster's settings."""

    account: str = ""
    """SLURM account where `--account` is not given."""
    partition: str = ""
    """SLURM partition where `--partition` is not given."""
    sbatch: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], str | int | bool] = Field(default={})
    """Options of sbatch by long name; `true` for those without a value."""
    environment: dict[Name, str | int] = Field(default={})
    """Exported before the processes start."""
    modules: list[str] = Field(default=[])
    """Environment modules to load."""
    setup: list[str] = Field(default=[])
    """Shell lines run on the first node before the processes start; they are code and are not quoted."""
    network_interface: str = ""
    """Network interface over which processes find each other, for NCCL and gloo."""
    nccl: dict[Name, str | int] = Field(default={})
    """NCCL's settings without their `NCCL_`."""
    srun: list[str] = Field(default=[])
    """Further options of srun."""
    container: str = ""
    """Image where `--container` is not given."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs the image: srun's `--container-image`, or `apptainer exec` on each node."""
    container_mounts: list[str] = Field(default=[])
    """`from:to` mounts besides the run folder and the working directory."""
    python: str = ""
    """Interpreter on the nodes; the one running now when empty, `python3` in a container."""
    batch_python: str = ""
    """Interpreter, 3.9 or newer, with which the job script takes its decisions, outside any container; `python` when
    empty, `python3` with a container."""
    template: str = ""
    """A job script template of your own; it may say `{% extends "slurm.sh.j2" %}` and replace blocks."""
    preflight: Preflight = Field(default_factory=Preflight)
    """Checks of the nodes."""

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        taken = sorted(OWN_OPTIONS & value.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by `headrace launch slurm` itself; use its options")
        return value

    def exports(self) -> dict[str, str]:
        """Environment variables of the processes."""
        interface = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.network_interface)
        nccl = {f"NCCL_{name}": str(value) for name, value in self.nccl.items()}
        own = {name: str(value) for name, value in self.environment.items()}
        return (interface if self.network_interface else {}) | nccl | own


def load_site(path: str | Path) -> Site:
    """The site file's settings; raises ConfigError."""
    file = read_yaml(path)
    raw = {} if file.data is None else file.mapping(list(Site.model_fields))
    site = validated(Site, raw, f"--site {path}")
    if site.template:  # beside the site file, wherever the command is given
        site = site.model_copy(update={"template": str(Path(path).parent / site.template)})
    return site
