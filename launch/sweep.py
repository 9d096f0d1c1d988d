"""`headrace sweep`: the same run with other settings, many times, as one array job.

    headrace sweep my.yaml --vary optimizer.lr=[1e-3,3e-3] --vary model.num_layers=[2,4] --nodes 1 --gpus-per-node 8

gives four runs in `<run.dir>/0000` to `0003`; `<run.dir>/sweep.json` says which is which. Each has its own checkpoints,
restarts and limit of failures, as if it had been launched alone.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headrace.errors import ConfigError
from headrace.yaml_file import parse_yaml
from launch.preflight import check_layout, usable_node_counts
from launch.request import SlurmRequest, check_request
from launch.site import Site
from launch.slurm import Script, Submitted, submit
from launch.snapshot import next_snapshot
from pretrain.config import load_config

MOST_POINTS = 1000
"""SLURM's own limit of an array is 1001 tasks unless a site raises it (`MaxArraySize`)."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    settings: dict[str, Any]
    """Values by key."""

    @property
    def overrides(self) -> list[str]:
        """The settings as `load_config` takes them; JSON is YAML."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]


def grid(vary: Sequence[str]) -> list[Point]:
    """Every combination of `KEY=[value, ...]`, the last key changing fastest. Raises ConfigError."""
    axes: dict[str, list[Any]] = {}
    for text in vary:
        key, separator, values = text.partition("=")
        try:
            parsed = parse_yaml(values)
        except yaml.YAMLError:
            parsed = None
        if not separator or not key or not isinstance(parsed, list) or not parsed:
            raise ConfigError(f"--vary {text!r}: write KEY=[value, value, ...]")
        if key in axes:
            raise ConfigError(f"--vary {key}: stands twice; put all its values into one list")
        if key == "run.dir":
            raise ConfigError("--vary run.dir: every run of a sweep gets a folder of its own inside run.dir")
        axes[key] = parsed
    if not axes:
        raise ConfigError("--vary is missing: name what the runs differ in, such as --vary optimizer.lr=[1e-3,3e-3]")
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > MOST_POINTS:
        raise ConfigError(f"--vary: {len(combinations)} runs are too many for one array job (at most {MOST_POINTS})")
    return [Point(f"{at:04}", dict(zip(axes, values, strict=True))) for at, values in enumerate(combinations)]


def launch_sweep(
    config_path: str | Path,
    overrides: Sequence[str],
    vary: Sequence[str],
    request: SlurmRequest,
    site: Site,
    at_once: int = 0,
    dry_run: bool = False,
) -> Submitted:
    """Submit one array job of all runs, `at_once` of them at the same time (0: as many as fit).

    Every run is checked before any is submitted. Raises ConfigError, LayoutError.
    """
    check_request(request)
    if at_once < 0:
        raise ConfigError(f"--at-once: at least 0, got {at_once}")
    if request.chain > 1:
        raise ConfigError("--chain: not for sweeps; their jobs requeue themselves")
    points = grid(vary)
    folder = Path(load_config(config_path, overrides).run.dir).absolute()
    configs, counts = {}, set(range(request.fewest_nodes, request.nodes + 1))
    for point in points:
        own = [f"run.dir={json.dumps(str(folder / point.name))}"]
        config = load_config(config_path, [*overrides, *point.overrides, *own])
        if config.checkpoint.copy_to is not None:  # a second place is one run's alone
            own.append(f"checkpoint.copy_to={json.dumps(f'{config.checkpoint.copy_to}/{point.name}')}")
            config = load_config(config_path, [*overrides, *point.overrides, *own])
        check_layout(config, request.nodes * request.processes_per_node)
        counts &= set(usable_node_counts(config, request.fewest_nodes, request.nodes, request.processes_per_node))
        configs[f"points/{point.name}.yaml"] = config
    snapshot = next_snapshot(folder)
    script = Script(request, folder, snapshot, Path.cwd(), site, sorted(counts), len(points), at_once)
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        table = [{"run": point.name, **point.settings} for point in points]
        (folder / "sweep.json").write_text(json.dumps(table, indent=1) + "\n")
    return submit(script, configs, dry_run)
