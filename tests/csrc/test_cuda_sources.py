"""CUDA sources without a GPU: compiled with warnings as errors, no spilled registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@needs_nvcc
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.cu")))
def test_compiles_without_warnings_and_spills_nothing(source: str, tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    command = ["nvcc", "-std=c++17", "-O3", *codes, *strict, "-c", str(CSRC / source), "-o", str(tmp_path / "x.o")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    said = answer.stdout + answer.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", said)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert {arch for _, arch in kernels} == {"sm_80", "sm_90"}
    assert len(used) == len(kernels) >= 4
    assert all(numbers == ("0", "0", "0") for numbers in used), list(zip(kernels, used, strict=True))
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert max(registers) <= 32  # more, and an SM does not hold its 2,048 threads
