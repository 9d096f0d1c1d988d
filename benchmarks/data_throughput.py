"""Tokens per CPU-second of Headrace's data scheduler and of other loaders, side by side on the same text.

    python benchmarks/data_throughput.py                          # everything; 1 to 2 hours, most of it the slow peers
    python benchmarks/data_throughput.py --peers none --sources 8 # ours alone
    python benchmarks/data_throughput.py --plot benchmarks/results/data_throughput.json

Builds 200 MB of text from what the machine carries and a 32,000-token tokenizer, installs the peers into an environment
of their own (benchmarks/peers.txt), converts the corpus for those that need it, then runs every arm in a fresh process
pinned to one core, all arms in turn, and starts over for each repeat: other work on the machine slows all of them.
What an arm is stands in docs/data_speed.md. An arm that cannot run is in the result with the reason.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loading import corpus, report
from loading.result import circumstances, result_options, versions, write_result
from rich.console import Console

HERE = Path(__file__).parent
RESULT = HERE / "results" / "data_throughput.json"
PICTURE = HERE.parent / "docs" / "images" / "data_throughput.png"
PEERS = ("datasets", "torchdata", "grain", "mosaic", "litdata", "megatron", "olmo")
PEER_PACKAGES = [
    "torch", "numpy", "tokenizers", "gigatoken", "datasets", "torchdata", "grain", "array_record",
    "mosaicml-streaming", "litdata", "megatron-core", "ai2-olmo-core",
]  # fmt: skip
OUR_PACKAGES = ["torch", "numpy", "pyarrow", "orjson", "zstandard", "tokenizers", "gigatoken"]
TIMEOUT_S = 900
# Loaders that encode with Hugging Face tokenizers do under 1 M tokens/s from first to last; the others get an epoch.
SLOW_TOKENS, SLOW_WARM_TOKENS = 3_000_000, 500_000
MIDDLE_TOKENS = 12_000_000
console = Console()


@dataclass(frozen=True)
class Arm:
    """One thing that is measured."""

    name: str
    label: str
    group: str
    """`text` and `tokens` are compared; `variant` shows ours otherwise; `floor` and `profile` explain."""
    run: str
    """`module:arm` in `loading`."""
    peer: str = ""
    """Whose environment it needs; empty: ours."""
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    """Tokens to measure; None: nine tenths of the corpus."""
    once: bool = False
    """Not repeated for 2 and 8 sources: it does not mix."""


def _ours(name: str, label: str, group: str, form: str, **config: Any) -> Arm:
    seq = {key: config.pop(key) for key in ("seq_len", "batch") if key in config}
    return Arm(name, label, group, "ours:stream", options={"format": form, "config": config, **seq})


def _text_peer(peer: str, label: str, run: str) -> list[Arm]:
    middle = MIDDLE_TOKENS if peer == "datasets" else None
    return [
        Arm(
            f"{run}_hf",
            f"{label} + tokenizers",
            "text",
            f"peers:{run}",
            peer,
            {"tokenizer": "huggingface"},
            SLOW_TOKENS,
        ),
        Arm(
            f"{run}_gigatoken", f"{label} + gigatoken", "text", f"peers:{run}", peer, {"tokenizer": "gigatoken"}, middle
        ),
    ]


ARMS = [
    _ours("ours_zst", "Headrace, .jsonl.zst", "text", "jsonl.zst"),
    _ours("ours_jsonl", "Headrace, .jsonl", "text", "jsonl"),
    _ours("ours_parquet", "Headrace, .parquet", "text", "parquet"),
    *_text_peer("grain", "Grain", "grain_text"),
    *_text_peer("torchdata", "torchdata nodes", "torchdata"),
    *_text_peer("datasets", "HF datasets", "datasets"),
    _ours("ours_npy", "Headrace, .npy", "tokens", "npy"),
    _ours("ours_bin", "Headrace, Megatron .bin", "tokens", "bin"),
    _ours("ours_cache", "Headrace, token cache", "tokens", "jsonl.zst", token_cache=""),
    Arm("litdata", "litdata TokensLoader", "tokens", "peers:litdata", "litdata"),
    Arm("megatron", "megatron-core GPTDataset", "tokens", "peers:megatron", "megatron"),
    Arm("grain_records", "Grain ArrayRecord", "tokens", "peers:grain_records", "grain"),
    Arm("olmo", "OLMo-core", "tokens", "peers:olmo", "olmo"),
    Arm("mosaic", "mosaicml-streaming MDS", "tokens", "peers:mosaic", "mosaic"),
    _ours("ours_best_fit", "best-fit packing", "variant", "jsonl.zst", packing="best_fit"),
    _ours("ours_no_thread", "without the loader thread", "variant", "jsonl.zst", prefetch=0),
    _ours("ours_lanes_24", "24 lanes", "variant", "jsonl.zst", lanes=24),
    _ours("ours_batch_256", "256 sequences a step", "variant", "jsonl.zst", batch=256),
    _ours("ours_seq_4096", "64 sequences of 4,096 a step", "variant", "jsonl.zst", seq_len=4096, batch=64),
    Arm("floor_decompress", "decompress .zst", "floor", "floors:decompress", once=True),
    Arm("floor_parse", "decompress and parse", "floor", "floors:parse", once=True),
    Arm("floor_read_encode", "decompress, parse, encode", "floor", "floors:read_encode", once=True),
    Arm("floor_encode", "encode text in memory", "floor", "floors:encode", options={"call": "document"}, once=True),
    Arm("floor_encode_batch", "… 64 documents a call", "floor", "floors:encode", options={"call": "batch"}, once=True),
    Arm("profile", "where our time goes", "profile", "ours:phases", options={"format": "jsonl.zst"}),
]  # fmt: skip
QUICK = ("ours_zst", "profile")


def main() -> None:
    options = _options()
    if options.plot:
        report.plot(json.loads(options.plot.read_text()), options.picture)
        console.print(f"wrote {options.picture}")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    folder = work / f"corpus-{options.mb}"
    facts = corpus.build(folder, options.mb, console.print)
    arms = [arm for arm in ARMS if not arm.peer or arm.peer in options.peers]
    if options.arms:
        arms = [arm for arm in arms if arm.name in options.arms]
    python = _peers_python(work, options.torch) if any(arm.peer for arm in arms) else None
    if python:
        _prepare(python, folder, options.sources, [peer for peer in options.peers if peer in PEERS])
    runs: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        plan = [(arm, n) for n in options.sources for arm in arms if not (arm.once and n != options.sources[0])]
        # Every other repeat backwards, so that no arm always follows the same neighbour.
        for arm, sources in plan if repeat % 2 == 0 else reversed(plan):
            key = arm.name if arm.once else f"{arm.name}/{sources}"
            known = runs.setdefault(key, [])
            if known and "not_run" in known[-1]:
                continue
            known.append(_run(arm, sources, folder, facts, options, python))
            _say(repeat, key, known[-1])
        result = {
            **circumstances("data_throughput.py"),
            "versions": {"ours": versions(OUR_PACKAGES), "peers": versions(PEER_PACKAGES, python) if python else {}},
            "corpus": facts,
            "settings": {"seq_len": 2048, "batch": 8, "lanes": options.lanes, "repeats": repeat + 1},
            "arms": summary(runs),
        }  # fmt: skip
        write_result(options.out, result)
    report.show(result, console)
    wrong = [arm["key"] for arm in result["arms"] if arm.get("same_tokens") is False]
    if wrong:
        sys.exit(f"two runs gave different tokens: {', '.join(wrong)}")


def _run(
    arm: Arm, sources: int, folder: Path, facts: dict[str, Any], options: Any, python: Path | None
) -> dict[str, Any]:
    """The arm's result from a fresh process."""
    full = facts["tokens"] * 9 // 10
    spec: dict[str, Any] = {
        "arm": arm.run,
        "folder": str(folder),
        "sources": sources,
        "weights": corpus.weights(facts, sources),
        "corpus_tokens": facts["tokens"],
        "seq_len": 2048,
        "batch": 8,
        "tokens": min(full, arm.tokens or full),
        "warm_tokens": min(facts["tokens"] // 16, SLOW_WARM_TOKENS if arm.tokens == SLOW_TOKENS else facts["tokens"]),
        "core": options.core,
        **arm.options,
    }  # fmt: skip
    if arm.run.startswith("ours:"):
        config = {**({"lanes": options.lanes} if options.lanes else {}), **arm.options.get("config", {})}
        if "token_cache" in config:
            cache = folder / f"token-cache-{sources}"
            if not cache.exists():  # an epoch that writes it, not counted
                spec["config"] = {**config, "token_cache": str(cache)}
                filled = _child(spec | {"tokens": facts["tokens"] * 5 // 4}, sys.executable)
                if "not_run" in filled:
                    shutil.rmtree(cache, ignore_errors=True)
                    return filled
            config["token_cache"] = str(cache)
        spec["config"] = config
    return _child(spec, str(python) if arm.peer else sys.executable)


def _child(spec: dict[str, Any], python: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-m", "loading.child", json.dumps(spec)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"not_run": f"took longer than {TIMEOUT_S} s"}
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        error = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"not_run": f"the process ended with {done.returncode}: {error[0][:200]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def summary(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One record an arm: median, least and most tokens per CPU-second, and ours divided by it, repeat by repeat."""
    known = {arm.name: arm for arm in ARMS}
    records = []
    for key, results in runs.items():
        name, _, sources = key.partition("/")
        arm = known[name]
        record: dict[str, Any] = {"key": key, "name": name, "label": arm.label, "group": arm.group, "peer": arm.peer}
        record |= {"sources": int(sources) if sources else None}
        records.append(record)
        if "not_run" in results[-1]:
            record["not_run"] = results[-1]["not_run"]
            continue
        speeds = [result["tokens_per_cpu_s"] for result in results]
        record |= {
            "tokens": results[-1]["tokens"],
            "mtok_per_cpu_s": _spread([speed / 1e6 for speed in speeds]),
            "setup_cpu_s": statistics.median(result["setup_cpu_s"] for result in results),
            "cpu_share_of_wall": round(statistics.median(result["cpu_s"] / result["wall_s"] for result in results), 2),
            "peak_rss_mb": max(result["peak_rss_mb"] for result in results),
        }
        hashes = [result["sha256"] for result in results if "sha256" in result]
        if hashes:
            record |= {"sha256": hashes[0], "same_tokens": len(set(hashes)) == 1 if len(hashes) > 1 else None}
        for ours, reference in (("ours_text", "ours_zst"), ("ours_npy", "ours_npy"), ("ours_cache", "ours_cache")):
            base = runs.get(f"{reference}/{sources}", [])
            pairs = [
                one["tokens_per_cpu_s"] / speed
                for one, speed in zip(base, speeds, strict=False)
                if "tokens_per_cpu_s" in one
            ]
            if pairs and arm.group in ("text", "tokens") and reference != name:
                record.setdefault("ratio", {})[ours] = _spread(pairs)
        if name == "profile":
            parts = [result["phases_cpu_s"] for result in results]
            phases = {phase: round(statistics.median(part.get(phase, 0.0) for part in parts), 4) for phase in parts[0]}
            record |= {"phases_cpu_s": phases, "phases_not_found": results[-1]["phases_not_found"]}
    return records


def _spread(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _say(repeat: int, key: str, result: dict[str, Any]) -> None:
    if "not_run" in result:
        console.print(f"[{repeat}] {key:28} not run: {result['not_run']}", markup=False)
        return
    speed, cpu = result["tokens_per_cpu_s"] / 1e6, result["cpu_s"]
    console.print(f"[{repeat}] {key:28} {speed:8.2f} Mtok/CPU-s  {cpu:7.2f} CPU-s", markup=False, highlight=False)


# -- the peers' environment ------------------------------------------------------------------------------------------


def _peers_python(work: Path, torch: str) -> Path:
    """The interpreter of the peers' environment, made from peers.txt unless it is there."""
    listed = HERE / "peers.txt"
    folder, wanted = work / "peers-venv", hashlib.sha256(listed.read_bytes() + torch.encode()).hexdigest()
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists() or done.read_text() != wanted:
        console.print(f"installing the peers into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, "--no-deps", "-r", listed], check=True)
        done.write_text(wanted)
    return python


def _prepare(python: Path, folder: Path, sources: list[int], peers: list[str]) -> None:
    """Convert the corpus for the peers that read formats of their own. One that fails says so when its arm runs."""
    converted = [peer for peer in peers if peer in ("megatron", "mosaic", "litdata", "grain", "olmo")]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    for count in sources:
        for peer in converted:
            console.print(f"converting the corpus for {peer}, {count} sources")
            command = [str(python), "-m", "loading.prepare", str(folder), str(count), "2048", peer]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            failed = [line for line in done.stderr.splitlines() if line.startswith(f"{peer}: ")]
            console.print(*failed, sep="\n", end="\n" if failed else "", markup=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", default=["all"], help=f"all, none, or some of: {', '.join(PEERS)}")
    parser.add_argument("--arms", nargs="+", help="only these arms (names as in the result file)")
    parser.add_argument("--sources", nargs="+", type=int, choices=(2, 8), default=[2, 8], help="the corpus as so many")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mb", type=int, default=200, help="megabytes of text to measure on")
    parser.add_argument("--lanes", type=int, help="data.lanes of our arms (default: the scheduler's)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to pin to")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="corpus, conversions, environment")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install as the peers' torch")
    parser.add_argument(
        "--quick", action="store_true", help="2 MB, 24 lanes, two repeats, few arms: does it still run?"
    )
    result_options(parser, RESULT, PICTURE)
    options = parser.parse_args()
    if options.quick:
        options.mb, options.lanes, options.sources = 2, 24, [8]
        options.repeats = min(options.repeats, 2)
        options.arms = options.arms or QUICK
    options.peers = {"all": list(PEERS), "none": []}.get(options.peers[0], options.peers)
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown:
        parser.error(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    return options


if __name__ == "__main__":
    main()
