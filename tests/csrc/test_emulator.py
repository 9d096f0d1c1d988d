"""The emulator itself: results of a correct kernel, and what it says of launches that a GPU would refuse or hang on."""

from pathlib import Path

import emulated
import pytest
import torch

pytestmark = emulated.needs_emulator
HERE = Path(__file__).parent


def turn(kernels: emulated.Emulated, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, largest, found = x.clone(), torch.full((len(x),), float("nan")), torch.zeros(2, dtype=torch.int64)
    kernels.ops.turn_rows(x, largest, found)
    return x, largest, found


@pytest.mark.parametrize("width", [2, 31, 96, 333, 12_345])
def test_sums_maxima_votes_and_shared_memory(width: int) -> None:
    kernels = emulated.load("rows", folder=HERE)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    mine, largest, found = emulated.under_every_schedule(kernels, lambda: turn(kernels, x))
    centered = x.double() - x.double().mean(1, keepdim=True)
    torch.testing.assert_close(largest.double(), centered.abs().amax(1), rtol=1e-5, atol=1e-5)
    expected = centered / centered.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(mine.double(), expected.flip(1), rtol=1e-4, atol=1e-5)
    assert int(found[0]) == int((x > 1).sum())


def test_nan_goes_through_maxima() -> None:
    kernels = emulated.load("rows", folder=HERE)
    x = torch.ones(1, 200)
    x[0, 77] = float("nan")
    assert bool(turn(kernels, x)[1].isnan().all())


@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 60_000)], ids=["no blocks", "too much shared memory"])
def test_a_launch_that_cuda_refuses_is_an_error(rows: int, width: int) -> None:
    kernels = emulated.load("rows", folder=HERE)
    with pytest.raises(RuntimeError, match="headrace::turn_rows: CUDA error 9"):
        turn(kernels, torch.zeros(rows, width))


SOURCE = (HERE / "rows.cu").read_text()
BEGIN = "  float sum = 0.0f;\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "  if (threadIdx.x < 40) __syncthreads();",
            r"emulated kernel turn, block \(0, 0, 0\): divergent barrier: thread 0 waits at __syncthreads "
            r"\(kernels.cu:16\), but thread \d+ came to __syncthreads \(device.cuh:\d+\)",
        ),
        (
            "  if (threadIdx.x < 40) { __syncthreads(); return; }",
            r"divergent barrier: thread 0 waits at __syncthreads \(kernels.cu:16\)",
        ),
        (
            "  if (threadIdx.x % 2 == 0) __syncwarp();",
            r"divergent barrier: thread 0 waits at __syncwarp \(kernels.cu:16\), but thread 1 came to __ballot_sync",
        ),
        (
            "  if (threadIdx.x < 8) __syncwarp(0xfff);",
            r"deadlock: 8 threads wait at __syncwarp \(kernels.cu:16\), thread 0 first; \d+ threads? waits? at __ball",
        ),
        (
            "  if (threadIdx.x == 33) return;",
            r"__shfl_xor_sync \(device.cuh:\d+\) of thread \d+ reads lane 1, which is not among the lanes that meet",
        ),
        (
            "  __syncwarp(0x1);",
            r"__syncwarp \(kernels.cu:16\) of thread 1: the calling lane is not in its own mask",
        ),
    ],
    ids=["some threads", "some return", "other barrier", "mask of absent lanes", "lane returned", "not in mask"],
)
def test_barriers_that_do_not_meet_are_named(line: str, message: str) -> None:
    kernels = emulated.load("rows", source=SOURCE.replace(BEGIN, f"{BEGIN}{line}\n"), folder=HERE)
    with pytest.raises(RuntimeError, match=message):
        turn(kernels, torch.ones(2, 100))
    with kernels.schedule("random"), pytest.raises(RuntimeError, match="emulated kernel turn"):
        turn(kernels, torch.ones(2, 100))
