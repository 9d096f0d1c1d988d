"""`setup.py`: what is built with and without nvcc and a compiler, and that what is built for GPUs runs on CPUs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
TRY = """
import sys, torch
torch.ops.load_library(sys.argv[1])
gate, up = torch.randn(5, 8), torch.randn(5, 8)
hidden = torch.ops.headrace.swiglu_forward(torch.cat([gate, up], dim=-1))
torch.testing.assert_close(hidden, torch.nn.functional.silu(gate) * up)
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(key for key in ("CPU", "CUDA") if has("headrace::swiglu_forward", key)))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What setup.py needs, with one family of kernels."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "headrace").mkdir()
    shutil.copy(ROOT / "headrace" / "version.py", tmp_path / "headrace")
    (tmp_path / "csrc" / "loader").mkdir(parents=True)
    shared = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cuh")]
    for path in [*shared, *(ROOT / "csrc").glob("swiglu*")]:
        shutil.copy(path, tmp_path / "csrc")
    shutil.copy(ROOT / "csrc" / "loader" / "sequences.c", tmp_path / "csrc" / "loader")
    for package in ("parallel/kernels", "data_scheduler"):
        (tmp_path / package).mkdir(parents=True)
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def devices(tree: Path) -> list[str]:
    """What the library that was built has kernels for, by a fresh process that also computes with it on the CPU."""
    library = str(next((tree / "parallel" / "kernels").glob("_C*.so")))
    answer = subprocess.run([sys.executable, "-c", TRY, library], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()


@pytest.mark.slow
@needs_nvcc
def test_a_library_with_cuda_kernels_serves_a_torch_without_cuda(tree: Path) -> None:
    """One GPU architecture; then nothing to do again; then without CUDA, which must not leave the old library there."""
    answer = build(tree, HEADRACE_CUDA="1", HEADRACE_CUDA_ARCHS="9.0")
    assert answer.returncode == 0, answer.stderr
    assert devices(tree) == ["CPU", "CUDA"]
    assert "sm_90" in answer.stdout + answer.stderr
    again = build(tree, HEADRACE_CUDA="1", HEADRACE_CUDA_ARCHS="9.0")
    assert again.returncode == 0
    assert "sm_90" not in again.stdout + again.stderr, "compiled again though nothing had changed"
    assert build(tree, HEADRACE_CUDA="0").returncode == 0
    assert devices(tree) == ["CPU"]


def test_without_a_compiler_it_is_said_and_no_error(tree: Path) -> None:
    (tree / "bin").mkdir()
    answer = build(tree, PATH=str(tree / "bin"), CXX="c++", CC="cc")
    assert answer.returncode == 0, answer.stderr
    assert "no C++ compiler, so torch's kernels are used; install g++ for those of csrc/" in answer.stderr
    assert not list(tree.glob("parallel/kernels/*.so"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HEADRACE_CUDA": "yes"}, "HEADRACE_CUDA=yes: it is 0 or 1"),
        ({"HEADRACE_CUDA": "1", "PATH": "", "CXX": "c++"}, "HEADRACE_CUDA=1, but the kernels cannot be built"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tree: Path, environment: dict[str, str], message: str) -> None:
    answer = build(tree, **environment)
    assert answer.returncode == 1
    assert message in answer.stderr.splitlines()[-1]
