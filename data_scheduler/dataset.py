"""The scheduler as a PyTorch dataset, for any training loop.

    scheduler = DataScheduler.from_config("recipes/quickstart.yaml", dp_rank=0, dp_size=1)
    for batch in scheduler:                                  # endless
        logits = model(batch["tokens"][:, :-1], cu_seqlens=batch["cu_seqlens"])
        ...
        torch.save({"model": ..., "data": scheduler.state_dict()}, path)

The state obeys the stateful protocol (`state_dict` / `load_state_dict`) of torchdata's StatefulDataLoader and friends.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_scheduler.batch import Batch
from data_scheduler.config import DataConfig
from data_scheduler.scheduler import Scheduler
from data_scheduler.stage_config import with_stages
from headrace.errors import ConfigError
from headrace.validation import validated
from headrace.yaml_file import Location, read_yaml

TorchBatch = dict[str, torch.Tensor]


class _WorkersRefused(ConfigError):
    """Stays one line when torch raises it again here, with a worker's traceback for an argument."""

    def __init__(self, *_: object) -> None:
        super().__init__("DataScheduler prepares batches itself: use DataLoader(..., batch_size=None, num_workers=0)")


class DataScheduler(IterableDataset[TorchBatch]):
    """An endless iterable of packed batches for one data-parallel rank.

    Each batch is a dict of tensors: `tokens` int64[b, seq_len + 1], `cu_seqlens` int32[documents + 1] over the
    flattened inputs, `position_ids` int64[b, seq_len], `source_ids` int64[b], `document_ids` int64[documents],
    `loss_mask` bool[b, seq_len] (False where the next token belongs to another document or carries no loss),
    `loss_weights` float32[b, seq_len] (weight of each prediction in the loss; 0 where the mask is False),
    `prefix_lengths` int64[documents] (tokens at the begin of each that may see one another in both directions).
    """

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    @classmethod
    def from_config(
        cls,
        config: DataConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        run_dir: str | os.PathLike[str] | None = None,
        run_steps: int | None = None,
    ) -> "DataScheduler":
        """Build from a `DataConfig`, a mapping, or a YAML file (a whole run's configuration, or its `data` section).

        With `run_dir` the journal is kept there, and a journal found there is continued. `run_steps` is the length of
        the whole run, for policies and stages that plan for it. Raises ConfigError, LayoutError or DataError.
        """
        data = config if isinstance(config, DataConfig) else _data_config(config)
        return cls(Scheduler(data, dp_rank=dp_rank, dp_size=dp_size, run_dir=run_dir, run_steps=run_steps))

    def __iter__(self) -> Iterator[TorchBatch]:
        if get_worker_info() is not None:
            # Worker processes would each hold a copy and repeat the data; the scheduler prefetches in its own thread.
            # One worker could deliver, but its position would be unknown here, where state_dict() is asked for.
            raise _WorkersRefused
        return (to_torch(batch) for batch in self.scheduler)

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank's lanes; `data_scheduler.merge_states` joins the ranks' for another world size."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position. Raises ConfigError when it belongs to another run's lanes or sources."""
        self.scheduler.load_state_dict(state)


def to_torch(batch: Batch) -> TorchBatch:
    """A batch as tensors (sharing memory with it)."""
    return {
        "tokens": torch.from_numpy(batch.tokens),
        "cu_seqlens": torch.from_numpy(batch.cu_seqlens),
        "position_ids": torch.from_numpy(batch.position_ids),
        "source_ids": torch.from_numpy(batch.source_ids),
        "document_ids": torch.from_numpy(batch.document_ids),
        "loss_mask": torch.from_numpy(np.ascontiguousarray(batch.loss_mask)),
        "loss_weights": torch.from_numpy(batch.loss_weights),
        "prefix_lengths": torch.from_numpy(batch.document_prefix_lengths),
    }


def _data_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> DataConfig:
    if isinstance(config, Mapping):
        raw: Mapping[str, Any] = config
        where = "data"
    else:
        file = read_yaml(os.fspath(config))
        raw, where = file.mapping(["data", *DataConfig.model_fields]), str(file.path)
    section: Location = ("data",) if "data" in raw else ()
    if isinstance(raw.get("data"), Mapping):
        try:
            raw = {"data": with_stages(raw)}
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    return validated(DataConfig, raw.get("data", raw), where, section)
