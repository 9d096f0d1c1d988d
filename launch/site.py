"""What a cluster wants that a run does not know: the `--site` file.

sbatch: {exclusive: true, mem: 0, cpus-per-task: 12}     # further #SBATCH options
environment: {NCCL_SOCKET_IFNAME: ib0}
setup: [module load cuda/12.8]                           # shell lines before the first process starts
srun: [--cpu-bind=none]                                  # further srun options
container_mounts: [/data:/data]
python: /opt/venv/bin/python
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from data_scheduler.config import StrictModel
from headrace.validation import validated
from headrace.yaml_file import read_yaml

OWN_OPTIONS = frozenset(
    {"account", "array", "error", "gpus", "gpus-per-node", "gres", "job-name", "nodes", "ntasks", "ntasks-per-node"}
    | {"open-mode", "output", "partition", "requeue", "signal", "time", "wrap"}
)
"""sbatch options the launcher sets from its own arguments, or that would break the script."""


class Site(StrictModel):
    """One cluster's settings."""

    sbatch: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], str | int | bool] = Field(default={})
    """Options of sbatch by long name; `true` for those without a value."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str | int] = Field(default={})
    """Exported before the processes start."""
    setup: list[str] = Field(default=[])
    """Shell lines run on the first node before the processes start; they are code and are not quoted."""
    srun: list[str] = Field(default=[])
    """Further options of srun."""
    container_mounts: list[str] = Field(default=[])
    """`from:to` mounts besides the run folder and the working directory."""
    python: str = ""
    """Interpreter on the nodes; the one running now when empty, `python3` in a container."""

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        taken = sorted(OWN_OPTIONS & value.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by `headrace launch slurm` itself; use its options")
        return value


def load_site(path: str | Path) -> Site:
    """The site file's settings; raises ConfigError."""
    file = read_yaml(path)
    raw = {} if file.data is None else file.mapping(list(Site.model_fields))
    return validated(Site, raw, f"--site {path}")
