"""The door to the device, on a machine without a GPU, and that it is the only one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel import accelerator

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = pytest.mark.skipif(accelerator.has_gpu(), reason="the CPU door is refused where CUDA exists")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)


@WITHOUT_GPU
def test_the_device_is_the_cpu() -> None:
    assert accelerator.device() == torch.device("cpu")
    assert accelerator.backend() == "gloo"
    assert accelerator.max_memory_allocated() > 10 << 20
    assert accelerator.describe()["backend"] == "gloo"
    accelerator.synchronize()


def test_random_state_comes_back() -> None:
    accelerator.manual_seed(3)
    state = accelerator.rng_state()
    first = torch.rand(4)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


@WITHOUT_GPU
def test_installing_twice_changes_nothing() -> None:
    accelerator.install()
    zeros, move = torch.zeros, torch.Tensor.cuda
    accelerator.install()
    assert torch.zeros is zeros
    assert torch.Tensor.cuda is move


@WITHOUT_GPU
def test_only_megatron_is_redirected() -> None:
    accelerator.install()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with torch.device("meta"):
        assert torch.zeros(1).device.type == "meta"
    inside = {"__name__": "megatron.core.pretended", "torch": torch}
    assert eval("torch.zeros(1, device='cuda').device.type", inside) == "cpu"
    assert eval("torch.zeros(1).type()", inside) == "torch.cuda.FloatTensor"


def test_refused_where_cuda_exists() -> None:
    code = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from parallel import accelerator\n"
        "try: accelerator._redirect_cuda_namespace()\n"
        "except RuntimeError as error: print(error)"
    )
    assert "must not be installed where CUDA exists" in run(code).stdout


def test_another_megatron_is_refused_in_one_line() -> None:
    code = (
        "import importlib.metadata as metadata; metadata.version = lambda name: '0.99'\n"
        "from headrace.errors import ConfigError\n"
        "try: import parallel.engine\n"
        "except ConfigError as error: print(error)"
    )
    assert run(code).stdout.startswith("megatron-core 0.99 is installed, headrace is built for 0.16.1")


def sources() -> list[Path]:
    packages = ("headrace", "data_scheduler", "parallel", "pretrain", "launch")
    return [path for package in packages for path in (ROOT / package).rglob("*.py")]


def test_nobody_else_asks_torch_for_cuda() -> None:
    door = ROOT / "parallel" / "accelerator.py"
    pattern = re.compile(r"torch\.cuda|\.cuda\(|device=\"cuda|is_cuda")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources()
        if path != door
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert not found


def test_nobody_else_imports_megatron() -> None:
    doors = {ROOT / "parallel" / "engine.py", ROOT / "parallel" / "accelerator.py"}
    pattern = re.compile(r"^\s*(import|from) megatron", re.MULTILINE)
    assert not [path.relative_to(ROOT) for path in sources() if path not in doors and pattern.search(path.read_text())]
