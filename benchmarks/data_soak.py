"""Does the data scheduler's memory stay flat, and does resuming take as long after a million sequences as after 1,000?

    python benchmarks/data_soak.py --minutes 15
    python benchmarks/data_soak.py --plot benchmarks/results/data_soak.json

20 sources, 240 lanes, one data-parallel rank that holds them all, real text (the corpus of data_throughput.py). Short
sequences, so that many pass. Memory: resident and unshared bytes over the sequences delivered, for --minutes or until
--sequences. Resume: a run stops after 1,000 and after a million sequences; a fresh process makes the scheduler, loads
the state and asks for a batch, several times in turn; the batches must be those of the run that went on.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from loading import corpus
from loading.result import circumstances, result_options, versions, write_result
from rich.console import Console

from data_scheduler import DataConfig, Scheduler
from data_scheduler.state import load_state, save_state

HERE = Path(__file__).parent
RESULT = HERE / "results" / "data_soak.json"
PICTURE = HERE.parent / "docs" / "images" / "data_soak.png"
SOURCES, LANES, BATCH = 20, 240, 240
COMPARED = 4  # batches after a resume that must be the same
console = Console()


def config(folder: Path, seq_len: int, scratch: Path) -> DataConfig:
    """The corpus's shards dealt to 20 sources of equal weight."""
    shards = [file for files in corpus.files(folder, "main", 8, "jsonl").values() for file in files]
    sources = [{"name": f"source-{at:02d}", "paths": shards[at::SOURCES]} for at in range(SOURCES)]
    return DataConfig.model_validate(
        {
            "tokenizer": str(folder / "tokenizer"),
            "sources": [source for source in sources if source["paths"]],
            "seq_len": seq_len,
            "global_batch_size": BATCH,
            "lanes": LANES,
            "cache_dir": str(scratch / "cache"),
        }
    )


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """The curve: sequences, resident MB, unshared MB, seconds."""
    process = psutil.Process()
    scratch = Path(spec["scratch"])
    began = time.perf_counter()
    scheduler = Scheduler(config(Path(spec["folder"]), spec["seq_len"], scratch), run_dir=scratch / "run")
    points: list[dict[str, float]] = []

    def look(sequences: int) -> None:
        found = process.memory_full_info()
        seconds = time.perf_counter() - began
        points.append(
            {
                "sequences": sequences,
                "rss_mb": round(found.rss / 1e6, 1),
                "uss_mb": round(found.uss / 1e6, 1),
                "seconds": round(seconds, 1),
            }
        )

    look(0)
    sequences, at = 0, 1.0
    for batch in scheduler:
        sequences += len(batch.starts)
        if sequences >= at:
            look(sequences)
            at = max(sequences * 1.02, sequences + 5_000)
        if sequences >= spec["sequences"] or time.perf_counter() - began > spec["minutes"] * 60:
            break
    look(sequences)
    state = scheduler.state_dict()
    scheduler.close()
    epochs = state["positions"][:, :, 0]
    return {"points": points, "sequences": sequences, "epochs": [int(epochs.min()), int(epochs.max())]}


def consume(spec: dict[str, Any]) -> dict[str, Any]:
    """Deliver so many sequences, save the state, and say what the next batches are."""
    scratch = Path(spec["scratch"])
    scheduler = Scheduler(config(Path(spec["folder"]), spec["seq_len"], scratch), run_dir=scratch / "run")
    for _ in range(spec["sequences"] // BATCH):
        next(scheduler)
    state = scheduler.state_dict()
    began = time.perf_counter()
    save_state(scratch / "state.npz", state)
    saved = time.perf_counter() - began
    hashes = _next_hashes(scheduler)
    scheduler.close()
    size = (scratch / "state.npz").stat().st_size
    return {"sequences": state["sequences"], "next": hashes, "save_ms": round(saved * 1e3, 1), "state_bytes": size}


def resume(spec: dict[str, Any]) -> dict[str, Any]:
    """A fresh process's way to its first batch."""
    scratch = Path(spec["scratch"])
    data = config(Path(spec["folder"]), spec["seq_len"], scratch)
    began, cpu = time.perf_counter(), time.process_time()
    scheduler = Scheduler(data, run_dir=scratch / "run")
    made = time.perf_counter()
    scheduler.load_state_dict(load_state(scratch / "state.npz"))
    loaded = time.perf_counter()
    first = next(scheduler)
    there = time.perf_counter()
    used = time.process_time() - cpu
    hashes = _next_hashes(scheduler, first)
    scheduler.close()
    return {
        "scheduler_ms": round((made - began) * 1e3, 1),
        "load_ms": round((loaded - made) * 1e3, 1),
        "first_batch_ms": round((there - loaded) * 1e3, 1),
        "wall_s": round(there - began, 4),
        "cpu_s": round(used, 4),
        "next": hashes,
    }


def _next_hashes(scheduler: Scheduler, first: Any = None) -> list[str]:
    batches = [first or next(scheduler), *(next(scheduler) for _ in range(COMPARED - 1))]
    return [hashlib.sha256(b"".join(batch.digests)).hexdigest()[:16] for batch in batches]


CHILDREN = {"memory": memory, "consume": consume, "resume": resume}


def child(name: str, core: int, **spec: Any) -> dict[str, Any]:
    """Run one of CHILDREN in a fresh process on one core."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--child", json.dumps({"name": name, "core": core, **spec}, default=str)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both parts."""
    folder = options.work.resolve() / f"corpus-{options.mb}"
    facts = corpus.build(folder, options.mb, console.print)
    scratch = Path(tempfile.mkdtemp(prefix="headrace-soak-"))
    common = {"folder": folder, "core": options.core}
    try:
        stops = {}
        for count in options.stops:
            console.print(f"a run of {count:,} sequences of {options.seq_len} tokens, to be resumed")
            stops[count] = child(
                "consume", **common, scratch=scratch / str(count), seq_len=options.seq_len, sequences=count
            )
        resumes: dict[int, list[dict[str, Any]]] = {count: [] for count in options.stops}
        for turn in range(options.repeats):
            for count in options.stops:
                # Every resume from the same journal: a resume adds its own events to it.
                own = scratch / f"{count}-{turn}"
                shutil.copytree(scratch / str(count), own)
                resumes[count].append(child("resume", **common, scratch=own, seq_len=options.seq_len))
        console.print(f"memory over {options.minutes} minutes")
        soak = child(
            "memory", **common, scratch=scratch / "memory", seq_len=options.seq_len,
            sequences=options.sequences, minutes=options.minutes,
        )  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        **circumstances("data_soak.py"),
        "versions": versions(["numpy", "pyarrow", "orjson", "gigatoken"]),
        "corpus": {key: facts[key] for key in ("megabytes", "bytes", "documents", "tokens", "sha256")},
        "settings": {"sources": SOURCES, "lanes": LANES, "batch": BATCH, "seq_len": options.seq_len},
        "memory": {**flatness(soak["points"]), "epochs_least_and_most": soak["epochs"], "points": soak["points"]},
        "resume": [summary(stops[count], resumes[count]) for count in options.stops],
    }


def flatness(points: list[dict[str, float]]) -> dict[str, float]:
    """Memory when all lanes have opened their sources, at most, at the end, and its slope over the second half."""
    opened = 4 * SOURCES * LANES  # the mixture reaches every lane of every source well before
    warm = next((point for point in points if point["sequences"] >= opened), points[-1])
    after = [point for point in points if point["sequences"] >= warm["sequences"]]
    half = [point for point in after if point["sequences"] >= points[-1]["sequences"] / 2]
    peak = max(after, key=lambda point: point["rss_mb"])
    slope = 0.0
    if len(half) > 2:
        slope = statistics.linear_regression([p["sequences"] / 1e6 for p in half], [p["uss_mb"] for p in half]).slope
    return {
        "sequences": points[-1]["sequences"],
        "before_first_batch_rss_mb": points[0]["rss_mb"],
        "warm_at_sequences": warm["sequences"],
        "warm_rss_mb": warm["rss_mb"],
        "warm_uss_mb": warm["uss_mb"],
        "peak_rss_mb": peak["rss_mb"],
        "peak_uss_mb": max(point["uss_mb"] for point in after),
        "end_uss_mb": points[-1]["uss_mb"],
        "peak_over_warm_rss": round(peak["rss_mb"] / warm["rss_mb"], 3),
        "second_half_uss_mb_per_million_sequences": round(slope, 2),
        "minutes": round(points[-1]["seconds"] / 60, 1),
    }


def summary(stop: dict[str, Any], resumes: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the resumes of one stop."""
    keys = ("scheduler_ms", "load_ms", "first_batch_ms", "wall_s", "cpu_s")
    return {
        "sequences": stop["sequences"],
        **{key: statistics.median(one[key] for one in resumes) for key in keys},
        "cpu_s_least_and_most": [min(one["cpu_s"] for one in resumes), max(one["cpu_s"] for one in resumes)],
        "state_bytes": stop["state_bytes"],
        "state_save_ms": stop["save_ms"],
        "same_batches": all(one["next"] == stop["next"] for one in resumes),
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured and its value, for the terminal and the page."""
    memory, resumes = result["memory"], result["resume"]
    slope = memory["second_half_uss_mb_per_million_sequences"]
    found = [
        ("sequences delivered", f"{memory['sequences']:,} in {memory['minutes']} minutes"),
        ("resident before the first batch", f"{memory['before_first_batch_rss_mb']:.0f} MB"),
        ("resident with all lanes of all sources open", f"{memory['warm_rss_mb']:.0f} MB"),
        ("most resident after that", f"{memory['peak_rss_mb']:.0f} MB ({memory['peak_over_warm_rss']:.2f} times)"),
        ("growth over the second half", f"{slope:+.1f} MB a million sequences"),
    ]
    for one in resumes:
        size = f"{one['cpu_s']:.2f} CPU-s ({one['wall_s']:.2f} s): scheduler {one['scheduler_ms']:.0f} ms, "
        size += f"state {one['load_ms']:.0f} ms, first batch {one['first_batch_ms']:.0f} ms"
        found.append((f"resume after {one['sequences']:,} sequences", size))
    ratio = resumes[-1]["cpu_s"] / resumes[0]["cpu_s"]
    found.append(("… the last over the first", f"{ratio:.2f} times"))
    found.append(("… next batches as without a stop", "yes" if all(one["same_batches"] for one in resumes) else "NO"))
    return found


def plot(result: dict[str, Any], picture: Path) -> None:
    """Memory over sequences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = result["memory"]["points"]
    figure, axis = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
    at = [point["sequences"] / 1e6 for point in points]
    axis.plot(at, [point["rss_mb"] for point in points], color="#1f618d", label="resident")
    axis.plot(at, [point["uss_mb"] for point in points], color="#7fb3d5", label="unshared")
    axis.set_ylim(0)
    axis.set_xlim(0)
    axis.set_xlabel(f"million sequences of {result['settings']['seq_len']} tokens delivered")
    axis.set_ylabel("MB")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e5e8e8", linewidth=0.6)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="how long the memory part runs at most")
    parser.add_argument("--sequences", type=int, default=10_000_000, help="where the memory part stops")
    parser.add_argument("--stops", type=int, nargs="+", default=[1_000, 1_000_000], help="sequences before a resume")
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="resumes from each stop")
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    result_options(parser, RESULT, PICTURE)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        spec = json.loads(options.child)
        os.sched_setaffinity(0, {spec["core"]})
        print("\n" + json.dumps(CHILDREN[spec["name"]](spec)), flush=True)
        return
    if options.plot:
        plot(json.loads(options.plot.read_text()), options.picture)
        return
    result = measure(options)
    write_result(options.out, result)
    from rich.table import Table

    table = Table(show_header=False)
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    if not all(one["same_batches"] for one in result["resume"]):
        sys.exit("a resumed run gave other batches than the run that went on")


if __name__ == "__main__":
    main()
