"""The embedding gradient's CUDA kernels on the emulator: the CPU kernel's bits, under every schedule."""

import emulated
import pytest
import torch

from parallel.kernels import embedding, extension

pytestmark = [
    emulated.needs_emulator,
    pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}"),
]
LENGTHS = {
    "one": [1],
    "segments": [63, 64, 65],
    "long": [1, 200, 65, 65, 2, 129],
    "single": [1] * 70,
    "one long": [300],
    "none": [],
}


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.load("embedding")


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("dtype", embedding.DTYPES)
@pytest.mark.parametrize("width", [1, 24, 2056])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gives_the_bits_of_the_cpu_kernel(
    kernels: emulated.Emulated, lengths: str, width: int, dtype: torch.dtype, offset: int
) -> None:
    """`tests/parallel/test_kernels_embedding.py` holds those against float64. Some tokens are outside the table."""
    if width > 1000 and lengths != "long":
        pytest.skip("wider than a block: once is enough")
    generator = torch.Generator().manual_seed(width)
    counts = torch.tensor([3, *LENGTHS[lengths], 70, 2] if LENGTHS[lengths] else [], dtype=torch.int64)
    tokens = torch.repeat_interleave(torch.arange(len(counts)) - 1, counts)  # -1 first, and two past the end
    order = torch.randperm(len(tokens), generator=generator)
    rows = max(0, len(counts) - 3)
    grad = emulated.guarded((len(tokens), width), dtype, offset)
    grad.copy_(torch.randn(grad.shape, generator=generator))
    table = emulated.guarded((rows, width), torch.float32, offset)
    start = torch.randn(table.shape, generator=generator)

    def both(ops: object) -> tuple[torch.Tensor, torch.Tensor]:
        table.copy_(start)
        ops.embedding_gradient_add_(table, grad, tokens, order)  # type: ignore[attr-defined]
        return table.clone(), ops.embedding_gradient(grad, tokens, order, rows)  # type: ignore[attr-defined]

    added, written = emulated.under_every_schedule(kernels, lambda: both(kernels.ops))
    cpu_added, cpu_written = both(torch.ops.headrace)
    assert torch.equal(added, cpu_added)
    assert torch.equal(written, cpu_written)
    assert rows == 0 or bool(written.any())
    emulated.check_canaries(grad, table)
