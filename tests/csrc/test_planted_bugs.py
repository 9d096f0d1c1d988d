"""Seven kinds of bugs, each planted into a kernel that has none: what finds each of them without a GPU.

missing barrier          two schedules, or poisoned shared memory: results differ or are NaN
overwritten in place     two schedules
write after read         a greedy schedule: a warp that is a barrier ahead of the others
divergent barrier        the emulator, which says which threads wait where
short reduction          float64
out of bounds            AddressSanitizer
"""

import ctypes
import math
import random
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import asan_call
import emulated
import pytest

pytestmark = emulated.needs_emulator
HERE = Path(__file__).parent
ROWS, WIDTH = 3, 500
TRACED = "rows for the race detector"
WITHOUT = ("rows", TRACED, "swiglu")
"""Kernels without a bug."""


class Bug(NamedTuple):
    family: str
    right: str
    """Text of the kernel, or of its headers."""
    wrong: str
    found_by: str
    """What the verdict on the kernel says of it."""
    races: bool = False
    """Compiled for the race detector."""


BUGS = {
    "missing barrier": Bug(
        "rows",
        "  if (lane == 0) warps[warp] = x;\n  __syncthreads();\n",
        "  if (lane == 0) warps[warp] = x;\n",
        "schedule reverse",
    ),
    "overwritten in place": Bug(
        "rows", "(row[width - 1 - i] - mean)", "(own[width - 1 - i] - mean)", "schedule reverse"
    ),
    "write after read": Bug(
        "rows", "  __syncthreads();  // all have read: the next call may write\n", "", "schedule warp_greedy"
    ),
    "divergent barrier": Bug(
        "rows",
        "  if (lane == 0) warps[warp] = x;\n  __syncthreads();\n",
        "  if (lane == 0) {\n    warps[warp] = x;\n    __syncthreads();\n  }\n",
        "deadlock: 3 threads wait at __syncthreads",
    ),
    "short reduction": Bug("rows", "int distance = 16;", "int distance = 8;", "differs from float64"),
    "lost update": Bug(
        "rows",
        "  if (threadIdx.x % kWarp == 0) above[threadIdx.x / kWarp] = large;\n",
        "  if (threadIdx.x < 3) above[threadIdx.x] = 0;\n  __syncthreads();\n"
        "  if (threadIdx.x % kWarp == 0) above[0] += large;\n",
        "race: thread 32 reads what thread 0 wrote, with no barrier in between",
        races=True,
    ),
    "out of bounds": Bug("swiglu", "if (at >= packs) return;", "if (at > packs) return;", "AddressSanitizer"),
}


def source(family: str, bug: Bug | None) -> str:
    """The kernel's source with the headers of kernels pasted in, and with the bug."""
    folder = emulated.CSRC if family == "swiglu" else HERE
    text = (folder / f"{family}.cu").read_text()
    for header in ("gated.cuh", "device.cuh"):  # the first includes the second
        pasted = (emulated.CSRC / header).read_text().replace("#pragma once\n", "")
        text = text.replace(f'#include "{header}"\n', pasted)
    if bug is None:
        return text
    assert bug.right in text, f"no longer in {family}.cu or its headers: {bug.right}"
    return text.replace(bug.right, bug.wrong)


@pytest.fixture(scope="module")
def libraries() -> dict[str, Path]:
    """Bug, or one of `WITHOUT` → library; compiled two at a time."""

    def build(name: str) -> tuple[str, Path]:
        bug = BUGS.get(name)
        family = bug.family if bug else name.split()[0]
        folder = emulated.CSRC if family == "swiglu" else HERE
        races = bug.races if bug else name == TRACED
        return name, emulated.launchers(family, (), source(family, bug), folder, family == "swiglu", races)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, [*WITHOUT, *BUGS]))


def function_of(library: Path, name: str) -> str:
    """The name of a launcher as the linker knows it."""
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"\b(_ZN8headrace\d+{name}\w*)", symbols)[0]


def turned(library: ctypes.CDLL, function: str, schedule: int, seed: int, numbers: list[float]) -> list[float] | str:
    """The rows after the kernel ran under a schedule; what the emulator said if it failed."""
    library.headrace_set_schedule(schedule, seed)
    x, largest = (ctypes.c_float * len(numbers))(*numbers), (ctypes.c_float * ROWS)()
    found, none = (ctypes.c_ulonglong * 2)(), ctypes.c_void_p(None)
    if library[function](x, largest, found, ctypes.c_int64(ROWS), ctypes.c_int64(WIDTH), none):
        library.headrace_failure.restype = ctypes.c_char_p
        return str(library.headrace_failure().decode())
    return [*x, *largest]


def verdict_on_rows(path: Path) -> str:
    """ "" for a kernel in which nothing is found; otherwise what found something."""
    library, function = ctypes.CDLL(str(path)), function_of(path, "turn_rows")
    draw = random.Random(0)
    numbers = [draw.gauss(0, 1) for _ in range(ROWS * WIDTH)]
    runs = [(schedule, 0) for schedule in range(5)] + [(2, seed) for seed in range(1, 4)]
    results: list[Any] = [turned(library, function, schedule, seed, numbers) for schedule, seed in runs]
    said = [result for result in results if isinstance(result, str)]
    if said:
        return said[0]
    names = [emulated.SCHEDULES[schedule] for schedule, _ in runs]
    found = [f"schedule {name}" for name, result in zip(names, results, strict=True) if result != results[0]]
    return "; ".join([*found, *([] if right(results[0], numbers) else ["differs from float64"])])


def right(result: list[float], numbers: list[float]) -> bool:
    """Whether the rows are what float64 says."""
    for row in range(ROWS):
        x = numbers[row * WIDTH : (row + 1) * WIDTH]
        mean = math.fsum(x) / WIDTH
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in x) / WIDTH)
        for at, each in enumerate(reversed(x)):
            if not math.isclose(result[row * WIDTH + at], (each - mean) / deviation, rel_tol=1e-4, abs_tol=1e-4):
                return False
    return True


def verdict_on_swiglu(path: Path) -> str:
    """Width 300 in fp32: 75 packs a row, so the last block is not full."""
    rows, width = 3, 300
    arguments = [0, [rows * width * 8], [rows * width * 4], rows, width, 0]
    answer = asan_call.command(path, function_of(path, "swiglu_forward_cuda"), arguments)
    return "" if answer.returncode == 0 else answer.stderr


VERDICTS: dict[str, Callable[[Path], str]] = {"rows": verdict_on_rows, "swiglu": verdict_on_swiglu}


@pytest.mark.parametrize("name", WITHOUT)
def test_nothing_is_found_in_a_kernel_without_a_bug(libraries: dict[str, Path], name: str) -> None:
    assert VERDICTS[name.split()[0]](libraries[name]) == ""


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_found(libraries: dict[str, Path], name: str) -> None:
    bug = BUGS[name]
    assert bug.found_by in VERDICTS[bug.family](libraries[name])
