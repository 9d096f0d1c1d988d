"""Where a run's numbers go.

In: records, plain dicts the training loop makes on rank 0. Out: `metrics.jsonl` always, and wandb, TensorBoard and a
Prometheus endpoint as the configuration says.

    sinks = open_sinks(config.metrics, run_dir, "quickstart", resume_step=0)
    for sink in sinks:
        sink.write({"step": 0, "tokens": 4096, "loss": 9.01, "source_loss": {"code": 8.9, "prose": 9.1}})
        sink.close()

Open `registry.py` first: it lists every name. Then `jsonl.py`, the file all else can be rebuilt from.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from headrace.errors import ConfigError
from pretrain.config import MetricsConfig
from pretrain.metrics.jsonl import JsonlSink, read_records
from pretrain.metrics.prometheus import PrometheusSink
from pretrain.metrics.registry import METRICS, Metric, Record
from pretrain.metrics.sink import Guarded, Sink
from pretrain.metrics.tensorboard import TensorboardSink
from pretrain.metrics.wandb import WandbSink

__all__ = ["METRICS", "Metric", "Record", "Sink", "open_sinks", "read_records"]

log = logging.getLogger(__name__)


def open_sinks(
    config: MetricsConfig, run_dir: str | Path, run_name: str, resume_step: int = 0, from_checkpoint: bool = False
) -> list[Sink]:
    """The sinks of a run, `metrics.jsonl` first; call on rank 0 only, before the first step.

    `resume_step` is the first step that will be recorded: 0 in a new run, the checkpoint's step in a resumed one;
    `from_checkpoint`, whether a new run starts from converted weights, whose scores are kept.
    `metrics.jsonl` failing (a full disk) stops the run with OSError. A tracker that fails while the run trains is
    dropped with a warning. One that cannot even start raises ConfigError in a new run; in a resumed one, where nobody
    may be watching, it is left out with a warning.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    name = run_name or run_dir.resolve().name
    trackers: list[tuple[str, bool, Callable[[], Sink]]] = [
        ("wandb", config.wandb.enabled, lambda: WandbSink(config.wandb, run_dir, name)),
        ("tensorboard", config.tensorboard, lambda: TensorboardSink(run_dir, resume_step)),
        ("prometheus", config.prometheus.enabled, lambda: PrometheusSink(config.prometheus, run_dir, name)),
    ]
    opened: list[Sink] = []
    try:
        for tracker, enabled, start in trackers:
            if not enabled:
                continue
            try:
                opened.append(Guarded(start(), tracker))
            except Exception as error:
                if not resume_step:
                    if isinstance(error, ConfigError):
                        raise
                    raise ConfigError(f"metrics.{tracker} cannot start: {error}") from error
                log.warning("metrics.%s cannot start and is left out: %s", tracker, error)
        # Opened last: a tracker that is refused must not have cost a killed run's records.
        return [JsonlSink.open(run_dir / "metrics.jsonl", resume_step, from_checkpoint), *opened]
    except BaseException:
        for sink in opened:
            sink.close()
        raise
