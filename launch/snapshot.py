"""A job's own copy of code and configuration, in `<run>/launch/<number>/`.

A requeued job may start weeks after it was submitted. It must run the code it was submitted with, not whatever the
working tree holds by then:

    launch/0001/code/{headrace,data_scheduler,parallel,pretrain,launch}/
    launch/0001/config.yaml     resolved, overrides included; of a sweep points/0000.yaml, ...
    launch/0001/checks.json     what nodes are asked before the run starts
    launch/0001/job.sh          the job script
    launch/0001/job-id          what SLURM answered, a line for each job of a chain
    launch/0001/exclude         nodes found bad, which later jobs avoid
"""

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, dump_config

PACKAGES = ("headrace", "data_scheduler", "parallel", "pretrain", "launch")


def next_snapshot(run_dir: Path) -> Path:
    """Where the next snapshot of this run goes; nothing is made."""
    folder = run_dir / "launch"
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return folder / f"{max(numbers, default=0) + 1:04}"


def write_snapshot(folder: Path, configs: Mapping[str, RunConfig], script: str, checks: Mapping[str, Any]) -> Path:
    """Fill the new `folder`; `configs` by file name. Returns the job script's path.

    Raises FileExistsError when somebody was faster.
    """
    folder.mkdir(parents=True)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(Path(spec.origin).parent, folder / "code" / package, ignore=ignore)
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump_config(config), encoding="utf-8")
    (folder / "checks.json").write_text(json.dumps(checks, indent=1))
    job = folder / "job.sh"
    job.write_text(script, encoding="utf-8")
    job.chmod(0o755)
    return job
