"""Weights & Biases, offline by default: files under `<run>/log/wandb`, sent later with `wandb sync`.

An offline file grows in blocks of 64 KiB, so a killed run loses its last few hundred records there (`metrics.jsonl`
loses none); a run that is told to stop must call `close()`. A resumed run goes on under the same wandb id, with `step`
as the axis of every chart: wandb refuses to go back in its own step count, and a resumed run has to.
"""

import logging
import secrets
from pathlib import Path
from typing import Any

import yaml

from headrace.errors import ConfigError
from pretrain.config import WandbConfig
from pretrain.metrics.registry import Record, scalars

log = logging.getLogger(__name__)


class WandbSink:
    """Sends records to one wandb run."""

    def __init__(self, config: WandbConfig, run_dir: Path, run_name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "metrics.wandb.enabled: wandb is not installed; `pip install 'headrace[trackers]'` or set it to false"
            ) from None
        if config.mode == "online" and not wandb.api.api_key:
            raise ConfigError(
                "metrics.wandb.mode: online needs an API key; run `wandb login`, set WANDB_API_KEY, or use mode offline"
            )
        options: dict[str, Any] = {
            "project": config.project,
            "name": run_name,
            "id": _run_id(run_dir),
            "dir": str(run_dir / "log"),
            "config": _run_config(run_dir),
            "resume": "allow",
            # The run folder has the log and the configuration; scraping the console doubles every line of it.
            "settings": wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30
            ),
        }
        try:
            self._run = wandb.init(mode=config.mode, **options)
        except Exception as error:
            if config.mode == "offline":
                raise
            log.warning("wandb cannot be reached (%s); recording offline, send it later with `wandb sync`", error)
            self._run = wandb.init(mode="offline", **options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log the record's numbers at its step."""
        self._run.log({"step": record["step"], **dict(scalars(record))})

    def close(self) -> None:
        """Finish the wandb run; this writes the blocks still held back."""
        self._run.finish()


def _run_id(run_dir: Path) -> str:
    """The wandb id of this run folder, drawn once: two folders of the same name are two runs."""
    path = run_dir / "log" / "wandb" / "run-id"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(secrets.token_hex(6) + "\n")
    return path.read_text().strip()


def _run_config(run_dir: Path) -> dict[str, Any]:
    """The run's resolved configuration without the exporter's token, which is a secret."""
    path = run_dir / "config.yaml"
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    config.get("metrics", {}).get("prometheus", {}).pop("token", None)
    return config
