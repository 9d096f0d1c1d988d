"""What the ranks know together of a step's batch."""

from collections.abc import Sequence

from data_scheduler import batch_sha256
from data_scheduler.batch import Batch
from data_scheduler.config import DataConfig
from parallel import exchange


def exhausted_everywhere(config: DataConfig, batch: Batch, names: Sequence[str]) -> list[str]:
    """Sources that every lane of every rank has given `max_epochs` times."""
    if not any(source.max_epochs for source in config.sources):
        return []
    going_on = exchange.largest((~batch.exhausted).astype(float).tolist())
    return [name for name, more in zip(names, going_on, strict=True) if not more]


def global_hash(batch: Batch, dp_rank: int) -> str:
    """SHA-256 of the step's global batch; the same for every layout."""
    parts = exchange.gather_bytes_over_data_parallel(b"".join(batch.digests))
    ranks = [[part[at : at + 32] for at in range(0, len(part), 32)] for part in parts]
    # Sequence g of the run belongs to rank g mod dp_size. Steps before may have had fewer sequences than ranks.
    first = (dp_rank - int(batch.slots[0])) % len(ranks)
    return batch_sha256([digest for row in zip(*ranks[first:], *ranks[:first], strict=True) for digest in row])
