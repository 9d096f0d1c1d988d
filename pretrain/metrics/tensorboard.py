"""TensorBoard event files: `tensorboard --logdir <run>/log/tensorboard`."""

from pathlib import Path

from headrace.errors import ConfigError
from pretrain.metrics.registry import Record, is_evaluation, scalars


class TensorboardSink:
    """Writes records as scalars."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        try:
            # torch's writer is thin; the event format comes from the `tensorboard` package, which it imports.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "metrics.tensorboard: tensorboard is not installed; `pip install 'headrace[trackers]'` or set "
                "it to false"
            ) from None
        # purge_step hides what a killed run wrote for the steps that are done again. An evaluation of the checkpoint
        # that was resumed from stands at resume_step and stays, hence two writers.
        folder = run_dir / "log" / "tensorboard"
        self._train = SummaryWriter(str(folder / "train"), purge_step=resume_step, flush_secs=10)
        self._val = SummaryWriter(str(folder / "val"), purge_step=resume_step + (resume_step > 0), flush_secs=10)

    def write(self, record: Record) -> None:
        """Add the record's numbers at its step."""
        writer = self._val if is_evaluation(record) else self._train
        for tag, value in scalars(record):
            writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Flush and close the event files."""
        self._train.close()
        self._val.close()
