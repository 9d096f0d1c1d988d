"""CUDA sources without a GPU: compiled with warnings as errors, no spilled registers, and run on the CPU."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from parallel.kernels import swiglu

CSRC = Path(__file__).parents[2] / "csrc"
CUDA_HOMES = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
INCLUDE = next((path for home in CUDA_HOMES if (path := Path(home, "include")).joinpath("cuda_bf16.h").exists()), None)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum class Dtype in swiglu.h
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
needs_headers = pytest.mark.skipif(INCLUDE is None or shutil.which("g++") is None, reason="no CUDA headers or no g++")
CANARY = 777.0


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


@pytest.fixture(scope="module", params=[None, 96], ids=["one launch", "slices"])
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """swiglu.cu compiled for the CPU, see csrc/launch.h; once with launches so small that it needs many."""
    library = tmp_path_factory.mktemp("emulated") / "swiglu.so"
    size = [] if request.param is None else [f"-DHEADRACE_PACKS_PER_LAUNCH={request.param}"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-I", str(INCLUDE)]
    subprocess.run(
        ["g++", *flags, *size, "-x", "c++", str(CSRC / "swiglu.cu"), "-shared", "-o", str(library)], check=True
    )
    return ctypes.CDLL(str(library))


def call(library: ctypes.CDLL, name: str, tensors: list[torch.Tensor], rows: int, width: int) -> None:
    symbols = subprocess.run(["nm", "-D", library._name], capture_output=True, text=True, check=True).stdout
    function = library[re.findall(rf"\b(_ZN8headrace\w*{name}\w*)", symbols)[0]]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = [ctypes.c_int64(rows), ctypes.c_int64(width)]
    assert function(ctypes.c_int(DTYPES[tensors[0].dtype]), *pointers, *sizes, ctypes.c_void_p(None)) == 0


def guarded(numbers: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """`numbers` poisoned numbers that begin `offset` numbers past a 16-byte boundary, between canaries."""
    buffer = torch.full((numbers + 64,), CANARY, dtype=dtype)
    start = (-buffer.data_ptr() // buffer.element_size()) % (16 // buffer.element_size()) + 16 + offset
    inner = buffer[start : start + numbers]
    inner.fill_(float("nan"))
    return inner


@needs_headers
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 8), (5, 64), (2, 352), (40, 24), (1, 1030), (0, 8)])
def test_kernels_on_the_cpu_agree_with_float64(
    emulated: ctypes.CDLL, rows: int, width: int, dtype: torch.dtype, offset: int
) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    buffers = [guarded(rows * each, dtype, offset) for each in (2 * width, width, width, 2 * width)]
    gate_up, hidden, grad, grad_gate_up = buffers
    gate_up.copy_(torch.randn(len(gate_up), generator=generator) * 4)
    grad.copy_(torch.randn(len(grad), generator=generator))
    call(emulated, "swiglu_forward_cuda", [gate_up, hidden], rows, width)
    call(emulated, "swiglu_backward_cuda", [grad, gate_up, grad_gate_up], rows, width)
    true = gate_up.double().reshape(rows, 2 * width).requires_grad_()
    true_hidden = swiglu.reference(true)
    true_hidden.backward(grad.double().reshape(rows, width))
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(hidden.double().reshape(rows, width), true_hidden.detach(), **tolerance)
    assert true.grad is not None
    torch.testing.assert_close(grad_gate_up.double().reshape(rows, 2 * width), true.grad, **tolerance)
    for inner in buffers:  # nothing around them was written
        whole = torch.empty(0, dtype=dtype).set_(inner.untyped_storage())  # type: ignore[call-overload]
        start = inner.storage_offset()
        assert bool((whole[:start] == CANARY).all())
        assert bool((whole[start + len(inner) :] == CANARY).all())
