"""The whole contract at once: random sources, weights, packers, sequence lengths, stops and world sizes."""

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Scheduler, batch_sha256, merge_states
from data_scheduler.state import load_state, save_state

Make = Callable[..., DataConfig]
WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "jsonl": lambda path, texts: path.write_bytes(jsonl(texts)),
    "jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts), mtime=0)),
    "jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(jsonl(texts))),
    "parquet": lambda path, texts: pq.write_table(pa.table({"text": texts}), path, row_group_size=40),
    "csv": lambda path, texts: path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts)),
    "txt": lambda path, texts: path.write_text("\n".join(texts)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One source of three files in each format, of different sizes."""
    root = tmp_path_factory.mktemp("library")
    for number, (suffix, write) in enumerate(WRITERS.items()):
        folder = root / suffix
        folder.mkdir()
        for shard in range(3):
            write(folder / f"{shard}.{suffix}", make_documents(f"{suffix}-{shard}", 30 + 40 * number, shard))
    return {suffix: root / suffix for suffix in WRITERS}


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(WRITERS)), min_size=1, max_size=4, unique=True))
    stages = draw(st.lists(st.sampled_from([16, 33, 64]), min_size=1, max_size=2))
    stops = st.tuples(st.integers(1, 8), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(0, 4))
    return {
        "weights": {name: draw(st.floats(0.01, 1.0)) for name in names},
        "packing": draw(st.sampled_from(["split", "best_fit"])),
        "seed": draw(st.integers(0, 3)),
        "chunk_bytes": draw(st.sampled_from([1024, 4096, 65536])),
        "seq_lens": stages,
        "parts": draw(st.lists(stops, min_size=1, max_size=5)),
    }


STEPS = 16


def go(
    make: Callable[..., DataConfig],
    seq_lens: list[int],
    parts: list[tuple[int, int, int]],
    folder: Path | None,
    run_dir: Path,
) -> list[str]:
    """Hashes of STEPS steps in parts; the sequence length changes half way, in the middle of a best-fit window."""
    hashes: list[str] = []
    state: Mapping[str, Any] | None = None
    for steps, dp, prefetch in [*parts, (STEPS, 1, 0)]:
        while steps and len(hashes) < STEPS:
            half = len(hashes) // (STEPS // 2)
            count = min(steps, STEPS // 2 * (half + 1) - len(hashes))
            config = make(seq_len=seq_lens[min(half, len(seq_lens) - 1)], prefetch=prefetch)
            # Rank 0 first: the others read its journal.
            ranks = [Scheduler(config, dp_rank=rank, dp_size=dp, run_dir=run_dir) for rank in range(dp)]
            for rank in ranks:
                if state is not None:
                    rank.load_state_dict(state)
            for _ in range(count):
                digests: dict[int, bytes] = {}
                for rank in ranks:
                    batch = next(rank)
                    digests.update(zip(batch.slots.tolist(), batch.digests, strict=True))
                hashes.append(batch_sha256([digests[slot] for slot in range(len(digests))]))
            state = merge_states([rank.state_dict() for rank in ranks])
            if folder is not None:
                save_state(folder / "state.npz", state)
                state = load_state(folder / "state.npz")
            for rank in ranks:
                rank.close()
            steps -= count
    return hashes


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_stream_state_and_shares(
    data_config: Make, library: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, plan: dict[str, Any]
) -> None:
    sources = [
        {"name": name, "paths": [str(library[name])], "weight": weight} for name, weight in plan["weights"].items()
    ]

    def make(**changes: Any) -> DataConfig:
        keys = ("packing", "seed", "chunk_bytes")
        return data_config(sources=sources, **{key: plan[key] for key in keys}, **changes)

    folder = tmp_path_factory.mktemp("run")
    whole = go(make, plan["seq_lens"], [], None, folder / "whole")
    stopped = go(make, plan["seq_lens"], plan["parts"], folder, folder / "stopped")
    assert stopped == whole


def test_state_is_small(tmp_path: Path, data_config: Make, corpus: Path) -> None:
    """240 lanes x 50 sources: under 64 bytes a pair, in memory as on disk."""
    sources = [{"name": f"s{number}", "paths": [str(corpus / "a")]} for number in range(50)]
    config = data_config(sources=sources, lanes=240, global_batch_size=240, packing="best_fit")
    scheduler = Scheduler(config)
    for _ in range(3):
        next(scheduler)
    state = scheduler.state_dict()
    pairs = 240 * 50
    assert sum(array.nbytes for array in state.values() if isinstance(array, np.ndarray)) < 64 * pairs
    save_state(tmp_path / "state.npz", state)
    assert (tmp_path / "state.npz").stat().st_size < 64 * pairs
