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

import yaml
from pydantic import Field, ValidationError, field_validator

from data_scheduler.config import StrictModel
from headrace.errors import ConfigError
from pretrain.config import parse_yaml

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
    try:
        raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
        return Site.model_validate({} if raw is None else raw)
    except OSError as error:
        raise ConfigError(f"--site {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--site {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors())
        valid = ", ".join(Site.model_fields)
        raise ConfigError(f"--site {path}: {'; '.join(problems)} (valid keys: {valid})") from None
