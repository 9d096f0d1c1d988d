"""Headrace's own arms: the scheduler as a PyTorch dataset with everything on that a training run has on.

Lanes, shuffled chunks and documents, a journal on disk, packing with document boundaries, a SHA-256 for every
sequence, the loader thread with its default depth, `state_dict()` every 50 steps. The result has the SHA-256 over all
sequences' digests: two runs of an arm must agree on it.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from data_scheduler import DataConfig, Scheduler
from data_scheduler.encoder import load_encoder
from loading import corpus
from loading.child import Arm, Spec, cpu_seconds
from loading.prepare import prepared

STATE_EVERY = 50


def config(spec: Spec, split: str, scratch: Path) -> DataConfig:
    """The configuration a user would write. `spec["format"]` names the files, `spec["config"]` adds keys.

    Indexes and copies go to `scratch`, which is new for every run: none finds what another left behind.
    """
    folder = Path(spec["folder"])
    form = spec["format"]
    if form in ("npy", "bin"):
        groups = corpus.GROUPS[spec["sources"]]
        if form == "npy":
            paths = {
                source: [str(folder / split / "tokens" / f"{kind}.npy") for kind in kinds]
                for source, kinds in groups.items()
            }
        else:
            copy = prepared(folder, split, "megatron", spec["sources"], spec["seq_len"])
            paths = {source: [str(copy / f"{source}.bin")] for source in groups}
    else:
        paths = corpus.files(folder, split, spec["sources"], form)
    sources = [{"name": name, "paths": paths[name], "weight": spec["weights"][name]} for name in paths]
    extra = dict(spec.get("config", {}))
    if "token_cache" in extra:  # a folder for each split, as two runs have
        extra["token_cache"] = f"{extra['token_cache']}/{split}"
    extra.setdefault("cache_dir", str(scratch))
    values: dict[str, Any] = {
        "tokenizer": str(folder / "tokenizer"),
        "sources": sources,
        "seq_len": spec["seq_len"],
        "global_batch_size": spec["batch"],
    }
    return DataConfig.model_validate(values | extra)


def stream(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """What `DataScheduler` yields, batch by batch."""
    from data_scheduler import dataset

    if "encoder" not in kept:
        kept["encoder"] = load_encoder(Path(spec["folder"]) / "tokenizer")
    run = Path(tempfile.mkdtemp(prefix="headrace-run-"))
    scheduler = Scheduler(config(spec, split, run / "cache"), run_dir=run, encoder=kept["encoder"])
    digest = hashlib.sha256()
    kept["report"] = lambda: {"sha256": digest.hexdigest(), "encoder": kept["encoder"].name}

    def batches() -> Iterator[int]:
        try:
            for step, batch in enumerate(scheduler):
                tensors = dataset.to_torch(batch)  # as DataScheduler does, which hands no digests on
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


# (phase, what is timed, by name: the parts of the engine may move; one that is not found is named in the result).
PHASES = (
    ("decompress", "data_scheduler.formats.compression:_Zstd.decompress"),
    ("parse", "data_scheduler.formats.lines:read_blocks"),
    ("read and cut", "data_scheduler.reading:UnitReader.read"),
    ("read and cut", "data_scheduler.parts:PartReader.read"),
    ("encode", "data_scheduler.encoder:GigatokenEncoder.encode"),
    ("encode", "data_scheduler.encoder:GigatokenEncoder.encode_batch"),
    ("join", "data_scheduler.chunk_tokens:OpenChunk.__init__"),
    ("join", "data_scheduler.chunk_tokens:OpenChunk.encode_group"),
    ("permute", "data_scheduler.source:permutation"),
    ("deal", "data_scheduler.source:deal"),
    ("pack", "data_scheduler.packing:SplitPacker.pack"),
    ("pack", "data_scheduler.best_fit:BestFitPacker.pack"),
    ("hash", "data_scheduler.batch:sequence_digest"),
    ("tensors", "data_scheduler.dataset:to_torch"),
    ("plan", "data_scheduler.producer:Producer.produce"),
    ("count", "data_scheduler.state:State.consume"),
    ("state_dict", "data_scheduler.scheduler:Scheduler.state_dict"),
)


def phases(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """`stream` without the loader thread, with a stopwatch around its parts: where the CPU time goes."""
    if split == "warm":
        kept["missing"] = _time_phases(kept)
    watch = kept["watch"]
    watch.seconds.clear()
    batches = stream({**spec, "config": {**spec.get("config", {}), "prefetch": 0}}, split, kept)
    inner, began = kept["report"], cpu_seconds()

    def report() -> dict[str, Any]:
        total = cpu_seconds() - began
        shares = {phase: round(seconds, 4) for phase, seconds in sorted(watch.seconds.items(), key=lambda i: -i[1])}
        shares["rest"] = round(total - sum(watch.seconds.values()), 4)
        return {**inner(), "phases_cpu_s": shares, "phases_not_found": kept["missing"]}

    kept["report"] = report
    return batches


def _time_phases(kept: dict[str, Any]) -> list[str]:
    """Put a stopwatch around every place of PHASES; those that are not there."""
    watch = kept["watch"] = Stopwatch()
    missing = []
    for phase, place in PHASES:
        module, _, path = place.partition(":")
        *parents, name = path.split(".")
        try:
            owner: Any = import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, watch.around(phase, getattr(owner, name)))
        except (ImportError, AttributeError):
            missing.append(place)
    return missing


ARMS: dict[str, Arm] = {"stream": stream, "phases": phases}
