"""How fast our kernels are on this machine: beside torch in eager mode, a plain copy, and other libraries' kernels.

    python benchmarks/kernels.py --threads 1
    python benchmarks/kernels.py --threads 1 --only swiglu     # measures this one again and leaves the others' figures
    python benchmarks/kernels.py --peers                       # and torch.compile, Liger, ... where they are installed

What is measured is in `kernel_cases/`, one file for each family of operators. All forms of a case run alternately, so
that other work on the machine slows all; a ratio is the median over runs that follow each other, another form's time
divided by ours (above 1: ours is faster). `of_copy` is our bandwidth divided by that of a copy of as many bytes, also
measured in between. `gpu` in the result is null where no GPU was at hand; `docs/generate.py` makes the table in
docs/kernels.md of it.
"""

import argparse
import importlib
import json
import math
import pkgutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases.case import Call, Case, Forms
from loading.result import circumstances, result_options, write_result

from headrace.errors import HeadraceError
from parallel import accelerator
from parallel.kernels import choice

RESULT = Path(__file__).parent / "results" / "kernels.json"
ROUNDS = 15
GPU_CACHE = 256e6
"""Bytes; several times the L2 cache of an H200 (60 MB), so that tensors come from memory."""
SAMPLE_S = {"cpu": 0.002, "cuda": 0.02}
"""Calls are repeated until a sample takes this long: a clock read and a synchronisation cost some 10 us."""


def all_cases() -> Iterator[Case]:
    """The cases of every file in `kernel_cases/`."""
    for module in sorted(pkgutil.iter_modules(kernel_cases.__path__), key=lambda each: each.name):
        if module.name != "case":
            yield from importlib.import_module(f"kernel_cases.{module.name}").cases()


def measure(case: Case, with_peers: bool, rounds: int) -> dict[str, Any]:
    """One record of the result."""
    device = accelerator.device()
    copies = math.ceil(GPU_CACHE / case.bytes_moved) if accelerator.has_gpu() else 1
    torch.manual_seed(0)
    built = [case.build(device) for _ in range(copies)]
    calls = {"torch": [forms.torch for forms in built], "ours": [forms.ours for forms in built]}
    calls["copy"] = [_copy(case.bytes_moved, device) for _ in range(copies)]
    skipped = _add_peers(calls, built) if with_peers else {}
    seconds = {name: [_sample(each)] for name, each in calls.items()}  # warms up, and says how long one takes
    repeats = {
        name: max(1, math.ceil(SAMPLE_S[device.type] / first[0] / copies)) * copies for name, first in seconds.items()
    }
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, each in calls.items():
            seconds[name].append(_sample(each, repeats[name]))

    def ratio(name: str) -> float:
        return round(statistics.median(t / o for t, o in zip(seconds[name], seconds["ours"], strict=True)), 3)

    def milliseconds(name: str) -> float:
        return round(statistics.median(seconds[name]) * 1e3, 4)

    peers: dict[str, Any] = {name: {"ms": milliseconds(name), "ratio": ratio(name)} for name in list(calls)[3:]}
    return {
        "op": case.kernel.name,
        "pass": case.part,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
        "bytes": case.bytes_moved,
        "torch_ms": milliseconds("torch"),
        "fused_ms": milliseconds("ours"),
        "ratio": ratio("torch"),
        "fused_gb_per_s": round(case.bytes_moved / statistics.median(seconds["ours"]) / 1e9, 2),
        "of_copy": ratio("copy"),
        "target": case.target,
        "peers": {**peers, **{name: {"skipped": why} for name, why in skipped.items()}} if with_peers else None,
    }


def _copy(bytes_moved: int, device: torch.device) -> Call:
    """Copies half as many bytes as are moved: each is read and written."""
    source = torch.randint(0, 255, (max(1, bytes_moved // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _add_peers(calls: dict[str, list[Call]], built: list[Forms]) -> dict[str, str]:
    """Adds the forms of the peers that are installed; returns why the others are not there."""
    skipped = {}
    for name in built[0].peers:
        try:
            calls[name] = [forms.peers[name]() for forms in built]
        except ImportError as error:
            skipped[name] = str(error)
    return skipped


def _sample(calls: list[Call], repeats: int = 1) -> float:
    """Seconds of one call, as the mean over `repeats`."""
    accelerator.synchronize()
    start = time.perf_counter()
    for i in range(repeats):
        calls[i % len(calls)]()
    accelerator.synchronize()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument(
        "--only", nargs="+", metavar="OP", help="names under `kernels:`; other figures stay as they are"
    )
    parser.add_argument("--peers", action="store_true", help="measure other libraries' kernels too")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"samples of each form (default: {ROUNDS})")
    result_options(parser, RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = "gpu" if accelerator.has_gpu() else "cpu"
    # A GPU's result is added to a CPU's and the other way round.
    result = json.loads(options.out.read_text()) if options.out.exists() else {"cpu": None, "gpu": None}
    kept = [] if options.only is None or result[kind] is None else result[kind]["results"]
    records = [record for record in kept if record["op"] not in options.only]
    for case in all_cases():
        if options.only is not None and case.kernel.name not in options.only:
            continue
        try:
            choice.choose(case.kernel, "fused", accelerator.device().type)
        except HeadraceError as error:
            sys.exit(str(error))
        record = measure(case, options.peers, options.rounds)
        print("  ".join(f"{value:>9}" for name, value in record.items() if name != "peers"), flush=True)
        records.append(record)
    facts = circumstances("kernels.py")
    facts["machine"] |= accelerator.describe() | {"torch": torch.__version__}
    result[kind] = {**facts, "results": sorted(records, key=lambda each: each["op"])}
    write_result(options.out, result)


if __name__ == "__main__":
    main()
