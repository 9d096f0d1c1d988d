"""What comes next: raw documents in, packed batches out, in an order that is a pure function of the run's journal.

    files ──► chunks ──► lanes ──► documents ──► tokens ──► sequences ──► batch
    manifest  order     lane      reading       encoder    packing       scheduler

A worked example. Two sources, weights 0.75 and 0.25, L = 4 lanes, global batch 4, sequences of 8 + 1 tokens:

1. `manifest` lists the files and cuts them into chunks; the list is written to the journal (`journal`).
2. Each epoch, `order` permutes a source's chunks by the seed and deals them to the 4 lanes by size. No lane ever
   looks at another lane's chunks.
3. Step 0 draws 3 sequences of source 0 and 1 of source 1 (`mixture`: 0.75 · 4 and 0.25 · 4); a seeded permutation lays
   them on the slots, say [0, 0, 1, 0].
4. Slot i is filled by lane i: lane 2 walks source 1 (`lane`: next chunk, its documents shuffled, encoded), and
   `packing` cuts 9 tokens.
5. With two data-parallel ranks, rank 0 owns lanes 0 and 2 and makes slots 0 and 2; the global batch is the same.
6. After the step, the state is 60 bytes per (lane, source): epoch, chunk, document, token, … (`state`).

Start reading at `scheduler.py`. Alone, in your own loop: `from data_scheduler import DataScheduler`.
"""

from typing import TYPE_CHECKING, Any

from data_scheduler.batch import Batch, Segments, batch_sha256
from data_scheduler.config import DataConfig, PolicyConfig, SourceConfig
from data_scheduler.journal import Event, Journal
from data_scheduler.packing import Packer
from data_scheduler.policies import Feedback, Policy
from data_scheduler.scheduler import Scheduler
from data_scheduler.state import merge_states

if TYPE_CHECKING:
    from data_scheduler.dataset import DataScheduler

Source = SourceConfig

__all__ = [
    "Batch",
    "DataConfig",
    "DataScheduler",
    "Event",
    "Feedback",
    "Journal",
    "Packer",
    "Policy",
    "PolicyConfig",
    "Scheduler",
    "Segments",
    "Source",
    "SourceConfig",
    "batch_sha256",
    "merge_states",
]


def __getattr__(name: str) -> Any:
    # Only the PyTorch face needs torch (2 s to import); everything else works without it.
    if name == "DataScheduler":
        try:
            from data_scheduler.dataset import DataScheduler
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                "DataScheduler needs torch, in the build for your device (pip install torch); "
                "Scheduler gives the same batches as numpy arrays"
            ) from None
        return DataScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
