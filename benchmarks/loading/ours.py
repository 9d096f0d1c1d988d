"""Headrace's own arms: the scheduler as a PyTorch dataset with everything on that a training run has on.

240 lanes, shuffled chunks and documents, a journal on disk, packing with document boundaries, a SHA-256 for every
sequence, the loader thread with its default depth, `state_dict()` every 50 steps. The result has the SHA-256 over all
sequences' digests: two runs of an arm must agree on it.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_scheduler import DataConfig, Scheduler
from data_scheduler.encoder import load_encoder
from loading import corpus
from loading.child import Arm, Spec, cpu_seconds

STATE_EVERY = 50


def config(spec: Spec, split: str) -> DataConfig:
    """The configuration a user would write. `spec["format"]` names the files, `spec["config"]` adds keys."""
    folder = Path(spec["folder"])
    form = spec["format"]
    if form in ("npy", "bin"):
        tokens = folder / split / ("tokens" if form == "npy" else "megatron")
        groups = corpus.GROUPS[spec["sources"]].items()
        paths = {source: [str(tokens / f"{kind}.{form}") for kind in kinds] for source, kinds in groups}
    else:
        paths = corpus.files(folder, split, spec["sources"], form)
    sources = [{"name": name, "paths": paths[name], "weight": spec["weights"][name]} for name in paths]
    values: dict[str, Any] = {
        "tokenizer": str(folder / "tokenizer"),
        "sources": sources,
        "seq_len": spec["seq_len"],
        "global_batch_size": spec["batch"],
    }
    return DataConfig.model_validate(values | spec.get("config", {}))


def stream(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """What `DataScheduler` yields, batch by batch."""
    from data_scheduler.dataset import to_torch

    if "encoder" not in kept:
        kept["encoder"] = load_encoder(Path(spec["folder"]) / "tokenizer")
    run = Path(tempfile.mkdtemp(prefix="headrace-run-"))
    scheduler = Scheduler(config(spec, split), run_dir=run, encoder=kept["encoder"])
    digest = hashlib.sha256()
    kept["report"] = lambda: {"sha256": digest.hexdigest(), "encoder": kept["encoder"].name}

    def batches() -> Iterator[int]:
        try:
            for step, batch in enumerate(scheduler):
                tensors = to_torch(batch)  # as DataScheduler does, which hands no digests on
                if step % STATE_EVERY == STATE_EVERY - 1:
                    scheduler.state_dict()
                for one in batch.digests:
                    digest.update(one)
                rows, width = tensors["tokens"].shape
                yield rows * (width - 1)
        finally:
            scheduler.close()
            shutil.rmtree(run, ignore_errors=True)

    return batches()


class Stopwatch:
    """CPU seconds of this thread by phase; a phase inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.thread_time()

    def _switch(self) -> None:
        now = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted for `phase`."""

        def timed(*args: Any, **options: Any) -> Any:
            self._switch()
            self._open.append(phase)
            try:
                return function(*args, **options)
            finally:
                self._switch()
                self._open.pop()

        return timed


def phases(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """`stream` without the loader thread, with a stopwatch around its parts: where the CPU time goes."""
    from data_scheduler import batch as batches
    from data_scheduler import dataset, order, scheduler, source
    from data_scheduler.formats import columns, lines
    from data_scheduler.lane import DocumentStream
    from data_scheduler.packing import PACKERS
    from data_scheduler.reading import UnitReader

    watch = kept["watch"] = Stopwatch()
    if "encoder" not in kept:
        kept["encoder"] = load_encoder(Path(spec["folder"]) / "tokenizer")
    encoder = kept["encoder"]
    places: list[tuple[Any, str, str]] = [
        (lines, "decompress", "decompress"),
        (lines, "byte_range", "read"),
        (columns, "_parquet_table", "parquet decode"),
        (UnitReader, "read", "parse"),
        (type(encoder), "encode", "encode"),
        (type(encoder), "encode_batch", "encode"),
        (scheduler, "sequence_digest", "hash"),
        (dataset, "to_torch", "tensors"),
        (source, "permutation", "permute"),
        (source, "deal", "permute"),
        (DocumentStream, "_open", "open chunks"),
        (PACKERS[config(spec, split).packing], "pack", "pack"),
        (scheduler.Scheduler, "_produce", "plan and rest"),
        (scheduler.Scheduler, "state_dict", "state_dict"),
    ]
    del batches, order
    if not kept.get("watched"):
        kept["originals"] = [(owner, name, getattr(owner, name)) for owner, name, _ in places if hasattr(owner, name)]
        kept["watched"] = True
    for owner, name, phase in places:
        original = next((f for o, n, f in kept["originals"] if (o, n) == (owner, name)), None)
        if original is not None:
            setattr(owner, name, watch.around(phase, original))
    spec = {**spec, "config": {**spec.get("config", {}), "prefetch": 0}}
    found = stream(spec, split, kept)
    inner = kept["report"]
    began = cpu_seconds()

    def report() -> dict[str, Any]:
        total = cpu_seconds() - began
        shares = {phase: round(seconds, 4) for phase, seconds in sorted(watch.seconds.items(), key=lambda i: -i[1])}
        shares["outside"] = round(total - sum(watch.seconds.values()), 4)
        return {**inner(), "phases_cpu_s": shares}

    kept["report"] = report
    return found


ARMS: dict[str, Arm] = {"stream": stream, "phases": phases}
