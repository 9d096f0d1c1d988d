"""The data scheduler's planning at the size of a large cluster, simulated on one machine: 1,024 data-parallel ranks, 50
sources, a million files.

    python benchmarks/data_scale.py
    python benchmarks/data_scale.py --plot benchmarks/results/data_scale.json

Only metadata: the manifests are made up (sizes log-normal, sources of very different sizes), nothing is read. What runs
is the engine's own code: cutting files into chunks, permuting and dealing them, mixing, laying out slots, the state.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from loading.result import circumstances, result_options, versions, write_result
from rich.console import Console
from rich.table import Table

from data_scheduler.config import SourceConfig
from data_scheduler.manifest import Manifest
from data_scheduler.mixture import Mixer, quantize, slots
from data_scheduler.order import Int64, deal, lanes_of, permutation
from data_scheduler.state import State, load_state, save_state

RESULT = Path(__file__).parent / "results" / "data_scale.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "data_scale.png"
SEED = 0
CHUNK_BYTES = 4 << 20
console = Console()


def cpu(function: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, what it returned)."""
    began = time.process_time()
    found = function()
    return time.process_time() - began, found


def rss_mb() -> float:
    """Resident memory now, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def file_counts(files: int, sources: int) -> list[int]:
    """Files per source: the k-th has 1/k of the first's, as mixtures of a few large and many small sources have."""
    shares = 1 / np.arange(1, sources + 1)
    counts = np.maximum(1, (shares / shares.sum() * files).astype(int))
    counts[0] += files - counts.sum()
    return [int(count) for count in counts]


def made_up(number: int, files: int) -> Manifest:
    """A source of `.jsonl.zst` files of 1 MB of text on average, so that a file is a chunk."""
    rng = np.random.default_rng(number)
    sizes = np.minimum(rng.lognormal(12.0, 0.9, files).astype(int) + 1, CHUNK_BYTES // 4)
    folder = f"/data/source-{number:02d}"
    names = [f"{folder}/{at // 1000:04d}/part-{at:07d}.jsonl.zst" for at in range(files)]
    return Manifest(f"source-{number:02d}", list(zip(names, sizes.tolist(), strict=True)), {})


def measure_index(files: int, sources: int, lanes: int) -> tuple[dict[str, Any], list[Int64]]:
    """Manifests and their chunks: time, memory, bytes in the journal; and the chunks' sizes, one array a source."""
    before = rss_mb()
    manifests = [made_up(number, count) for number, count in enumerate(file_counts(files, sources))]
    held = rss_mb() - before
    sizes, seconds, chunk_mb, written, to_journal, from_journal = [], 0.0, 0.0, 0, 0.0, 0.0
    for manifest in manifests:
        used, line = cpu(lambda manifest=manifest: orjson.dumps(manifest.to_data()))
        to_journal, written = to_journal + used, written + len(line)
        from_journal += cpu(lambda line=line: Manifest.from_data(orjson.loads(line)))[0]
        config = SourceConfig(name=manifest.source, paths=["/data"])
        before = rss_mb()
        used, chunks = cpu(lambda manifest=manifest, config=config: manifest.chunks(config, CHUNK_BYTES, lanes))
        chunk_mb += max(0.0, rss_mb() - before)
        seconds += used
        sizes.append(chunks.sizes())
        del chunks
    chunks_total = sum(map(len, sizes))
    return {
        "files": files,
        "chunks": chunks_total,
        "manifest_mb": round(held, 1),
        "journal_bytes_per_file": round(written / files, 1),
        "journal_write_cpu_s": round(to_journal, 3),
        "journal_read_cpu_s": round(from_journal, 3),
        "chunks_cpu_s": round(seconds, 3),
        "chunks_mb": round(chunk_mb, 1),
    }, sizes


def dealt(sizes: Int64, lanes: int, source: str, epoch: int) -> tuple[float, list[Int64]]:
    """(CPU seconds, chunks per lane) of one epoch, as `SourceReader.hand` deals it."""

    def one() -> list[Int64]:
        order = permutation(len(sizes), SEED, "chunks", source, epoch)
        seats = permutation(lanes, SEED, "lanes", source, epoch)
        return deal(sizes, order, seats)

    return cpu(one)


def measure_dealing(sizes: list[Int64], lanes: int, ranks: int) -> dict[str, Any]:
    """Dealing time per epoch, and how even bytes are over lanes and ranks."""
    per_lane = np.zeros(lanes, np.int64)
    seconds, gaps = [], []
    for number, of_source in enumerate(sizes):
        used, hands = dealt(of_source, lanes, f"source-{number:02d}", 0)
        loads = np.array([int(of_source[hand].sum()) for hand in hands], np.int64)
        seconds.append(used)
        gaps.append({"chunks": len(of_source), **_balance(loads), "largest_chunk": int(of_source.max())})
        assert int(loads.max() - loads.min()) <= int(of_source.max()), "lanes differ by more than a chunk"
        per_lane += loads
    growth = []
    for count in (1_000, 10_000, 100_000, 1_000_000):
        drawn = np.random.default_rng(count).integers(1 << 20, CHUNK_BYTES, count)
        growth.append({"chunks": count, "cpu_s": round(dealt(drawn, lanes, "growth", 0)[0], 4)})
    return {
        "all_sources_cpu_s": round(sum(seconds), 3),
        "largest_source_cpu_s": round(seconds[0], 3),
        "by_chunks": growth,
        "bytes_per_lane": _balance(per_lane),
        "bytes_per_rank": _balance(np.array([per_lane[rank::ranks].sum() for rank in range(ranks)])),
        "by_source": gaps,
    }


def _balance(values: Int64) -> dict[str, float]:
    mean = float(values.mean())
    return {
        "min": int(values.min()),
        "mean": round(mean),
        "max": int(values.max()),
        "max_over_mean": round(float(values.max()) / mean, 6),
    }


def measure_planning(sources: int, lanes: int, ranks: int, batch: int, steps: int) -> dict[str, Any]:
    """Mixer and slots per step; sequences per rank and per lane, and how exact the mixture is."""
    names = [f"source-{number:02d}" for number in range(sources)]
    weights = dict(zip(names, file_counts(1_000_000, sources), strict=True))
    shares = quantize(weights, names)
    mixer, times = Mixer(sources), []
    worst, drawn = 0.0, np.zeros(sources, np.int64)
    exact = np.array([weights[name] for name in names]) / sum(weights.values())
    streams = []
    asked = np.zeros((lanes, sources), np.int32)
    for step in range(steps):
        lane = lanes_of(step * batch, batch, lanes)
        used, laid_out = cpu(lambda step=step, lane=lane: slots(mixer.counts(shares, batch), asked, lane, SEED, step))
        times.append(used)
        drawn += np.bincount(laid_out, minlength=sources)
        worst = max(worst, float(np.abs(drawn - exact * batch * (step + 1)).max()))
        # Sequence g belongs to lane g mod L, lane l to rank l mod DP.
        rank = lane % ranks
        per_rank = np.bincount(rank, minlength=ranks)
        assert per_rank.min() == per_rank.max() == batch // ranks, "ranks have unequal shares of a step"
        streams.append(len(np.unique(rank * sources + laid_out)) / ranks)
    return {
        "batch": batch,
        "steps": steps,
        "plan_ms_median": round(statistics.median(times) * 1e3, 3),
        "plan_ms_max": round(max(times) * 1e3, 3),
        "sequences_per_rank": batch // ranks,
        "sources_per_rank_and_step": round(statistics.mean(streams), 2),
        "worst_sequences_off_the_mixture": round(worst, 3),
    }


def measure_state(sources: int, lanes: int) -> dict[str, Any]:
    """A state with every lane somewhere: bytes, and milliseconds to copy, save and load."""
    names = [f"source-{number:02d}" for number in range(sources)]
    state = State.fresh(lanes, names)
    rng = np.random.default_rng(0)
    # Epoch, chunk, document and token as they are some way into a run; then what each lane gave.
    state.positions[..., :4] = rng.integers(0, [3, 300, 500, 2000], (*state.positions.shape[:2], 4))
    state.given[:] = rng.integers(0, 100_000, (*state.given.shape[:2], 1)) * [1, 4097]
    to_dict, data = cpu(lambda: state.to_dict(0, 1))
    held = sum(value.nbytes for value in data.values() if isinstance(value, np.ndarray))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.npz"
        began = time.perf_counter()
        save_state(path, data)
        saved = time.perf_counter()
        load_state(path)
        loaded = time.perf_counter()
        size = path.stat().st_size
    return {
        "lanes": lanes,
        "sources": sources,
        "bytes": held,
        "file_bytes": size,
        "state_dict_ms": round(to_dict * 1e3, 3),
        "save_ms": round((saved - began) * 1e3, 2),
        "load_ms": round((loaded - saved) * 1e3, 2),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; progress on the terminal."""
    console.print(f"{options.files:,} files in {options.sources} sources: manifests and chunks")
    index, sizes = measure_index(options.files, options.sources, options.lanes)
    console.print(f"dealing {index['chunks']:,} chunks to {options.lanes:,} lanes")
    dealing = measure_dealing(sizes, options.lanes, options.ranks)
    console.print(f"planning steps for {options.ranks:,} ranks")
    planning = [
        measure_planning(options.sources, options.lanes, options.ranks, batch, options.steps)
        for batch in options.batches
    ]
    states = [measure_state(sources, lanes) for lanes, sources in ((240, 50), (options.lanes, options.sources))]
    return {
        **circumstances("data_scale.py"),
        "versions": versions(["numpy", "orjson"]),
        "settings": {key: getattr(options, key) for key in ("ranks", "sources", "lanes", "files")},
        "index": index,
        "dealing": dealing,
        "planning": planning,
        "state": states,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured and its value, for the terminal and the page."""
    index, dealing, settings = result["index"], result["dealing"], result["settings"]
    found = [
        ("manifests in the journal", f"{index['journal_bytes_per_file']} bytes a file"),
        ("reading them back", f"{index['journal_read_cpu_s']:.2f} CPU-s for {index['files']:,} files"),
        ("memory of manifests and chunks", f"{index['manifest_mb'] + index['chunks_mb']:.0f} MB"),
        ("cutting files into chunks, once a start", f"{index['chunks_cpu_s']:.2f} CPU-s"),
        ("dealing an epoch of all sources", f"{dealing['all_sources_cpu_s']:.2f} CPU-s for {index['chunks']:,} chunks"),
        ("dealing one source of a million chunks", f"{dealing['by_chunks'][-1]['cpu_s']:.2f} CPU-s"),
        ("most loaded lane, bytes over the mean", f"{dealing['bytes_per_lane']['max_over_mean']:.4f}"),
        ("most loaded rank, bytes over the mean", f"{dealing['bytes_per_rank']['max_over_mean']:.4f}"),
    ]
    for plan in result["planning"]:
        each = f"{plan['plan_ms_median']:.2f} ms, {plan['sequences_per_rank']} sequences for every rank"
        found.append((f"planning a step of {plan['batch']:,} sequences", each))
        found.append(("… farthest from the mixture", f"{plan['worst_sequences_off_the_mixture']} sequences"))
    for state in result["state"]:
        size = f"{state['bytes'] / 1e6:.2f} MB, saved in {state['save_ms']:.0f} ms, loaded in {state['load_ms']:.0f} ms"
        found.append((f"state of {state['lanes']:,} lanes, {state['sources']} sources", size))
    found.append((f"peak memory, {settings['ranks']:,} ranks' plans in one process", f"{result['peak_rss_mb']:,} MB"))
    return found


def plot(result: dict[str, Any], picture: Path) -> None:
    """Left: dealing time over chunks. Right: bytes of every source's lanes, least and most over the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    growth = result["dealing"]["by_chunks"]
    left.loglog([row["chunks"] for row in growth], [row["cpu_s"] for row in growth], "o-", color="#1f618d")
    for row in growth:
        left.annotate(
            f"{row['cpu_s']:.3g} s", (row["chunks"], row["cpu_s"]), (4, -11), textcoords="offset points", fontsize=8
        )
    left.set_xlabel("chunks of a source")
    left.set_ylabel("CPU seconds")
    left.set_title(f"Dealing an epoch to {result['settings']['lanes']:,} lanes", loc="left", fontsize=10)
    sources = result["dealing"]["by_source"]
    place = range(1, len(sources) + 1)
    right.fill_between(
        place,
        [row["min"] / row["mean"] for row in sources],
        [row["max"] / row["mean"] for row in sources],
        color="#7fb3d5",
        label="least to most loaded lane",
    )
    right.axhline(1, color="#17202a", linewidth=0.8)
    ranks = result["dealing"]["bytes_per_rank"]
    right.axhline(ranks["max"] / ranks["mean"], color="#c0392b", linewidth=1, label="most loaded rank, all sources")
    right.set_xlabel("source, largest first")
    right.set_ylabel("bytes over the mean")
    right.set_ylim(0)
    right.legend(frameon=False, fontsize=8, loc="lower left")
    right.set_title("Balance after dealing", loc="left", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e8e8", linewidth=0.6)
        axis.set_axisbelow(True)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--lanes", type=int, default=4096, help="a multiple of the ranks")
    parser.add_argument("--sources", type=int, default=50)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[4096, 16384], help="global batch sizes, in sequences"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps planned for each batch size")
    result_options(parser, RESULT, PICTURE)
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.plot.read_text()), options.picture)
        return
    if options.lanes % options.ranks or any(batch % options.ranks for batch in options.batches):
        parser.error("lanes and batch sizes must be multiples of the ranks")
    result = measure(options)
    write_result(options.out, result)
    table = Table(show_header=False)
    for row in rows(result):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
