"""The CUDA kernels of QK-norm and rotary embedding on the emulator: the same bits under every schedule, right by
float64, no write beside."""

from dataclasses import replace

import emulated
import pytest
import torch
from qk_norm_rope_cases import MAX_POSITION, NORMS, Case, check_against_float64, random_case

from parallel.kernels.qk_norm_rope import DTYPES, HeadNorm

pytestmark = emulated.needs_emulator

# Teams of 4, 8, 16 and 32 lanes in bf16 and fp32, halves that fill no team, single numbers, and no token.
SHAPES = [(3, 2, 2, 64), (2, 1, 3, 80), (2, 2, 1, 128), (1, 1, 2, 256), (2, 1, 1, 512), (5, 3, 4, 16), (4, 2, 2, 22),
          (9, 1, 1, 2), (0, 2, 2, 64), (2, 0, 1, 8)]  # fmt: skip


FEW_BLOCKS = ("HEADRACE_QK_MOST_PARTS=4",)
"""In the backward pass: so few that each has several rounds of heads."""


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.load("qk_norm_rope", FEW_BLOCKS)


def guarded(tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
    copy = emulated.guarded(tuple(tensor.shape), tensor.dtype, offset)
    return copy.copy_(tensor)


def run(library: emulated.Emulated, case: Case, offset: int = 0) -> dict[str, torch.Tensor]:
    """What `qk_norm_rope_cases.results` gives, from the emulated kernels, equal under every schedule."""
    qkv, cos, sin = (guarded(x, offset) for x in (case.qkv, case.cos, case.sin))
    positions, grads = guarded(case.positions), [guarded(x, offset) for x in case.grads]
    vectors = [None if x is None else guarded(x, offset) for x in (case.norm[:4] if case.norm else [None] * 4)]
    eps = case.norm.eps if case.norm else 0.0

    def both() -> tuple[torch.Tensor, ...]:
        forward = library.ops.qk_norm_rope_forward(qkv, positions, cos, sin, *vectors, eps, True)
        backward = library.ops.qk_norm_rope_backward(*grads, qkv, positions, cos, sin, *vectors[:2], forward[2])
        return (*forward, *backward)

    query, key, _, lengths, grad_qkv, grad_weights = emulated.under_every_schedule(library, both)
    emulated.check_canaries(qkv, cos, sin, positions, *grads, *(x for x in vectors if x is not None))
    of_weights = grad_weights.transpose(0, 1).flatten(0, 1).to(qkv.dtype)  # query's, key's weight; query's, key's bias
    return {
        "query": query,
        "key": key,
        "value": qkv[:, :, -1],
        "lengths": lengths,
        "grad_qkv": grad_qkv,
        **{f"grad_{name}": x for name, x in zip(HeadNorm._fields, of_weights, strict=False)},
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(
    kernels: emulated.Emulated, shape: tuple[int, int, int, int], dtype: torch.dtype, norm: str
) -> None:
    case = random_case(shape, norm, dtype, positions=torch.int32 if norm == "none" else torch.int64)
    check_against_float64(run(kernels, case), case)


@pytest.mark.parametrize("norm", NORMS)
def test_agrees_where_tensors_do_not_begin_on_16_bytes(kernels: emulated.Emulated, norm: str) -> None:
    for dtype in DTYPES:
        case = random_case((3, 2, 1, 64), norm, dtype)
        check_against_float64(run(kernels, case, offset=1), case)


@pytest.mark.parametrize("norm", NORMS)
def test_agrees_when_blocks_have_many_rounds(kernels: emulated.Emulated, norm: str) -> None:
    for dtype in DTYPES:
        case = random_case((70, 1, 2, 64), norm, dtype)
        check_against_float64(run(kernels, case), case)


def test_positions_outside_the_tables_make_nan(kernels: emulated.Emulated) -> None:
    case = random_case((4, 1, 1, 64))
    positions = torch.tensor([0, MAX_POSITION, -1, MAX_POSITION - 1])
    found = run(kernels, replace(case, positions=positions))
    outside = torch.tensor([False, True, True, False])
    for name in ("query", "key"):
        assert torch.equal(found[name].isnan().all(-1).all(-1), outside)
        assert torch.equal(found[name].isnan().any(-1).any(-1), outside)
    assert torch.equal(found["grad_qkv"][:, :, :2].isnan().flatten(1).all(1), outside)


def test_a_missing_barrier_is_seen() -> None:
    """The sums of a block's warps go through shared memory; without the barrier they race."""
    source = (emulated.CSRC / "qk_norm_rope.cu").read_text()
    broken = source.replace("    __syncthreads();\n  }\n}", "  }\n}", 1)
    assert broken != source
    library = emulated.load("qk_norm_rope", FEW_BLOCKS, source=broken)
    with pytest.raises(AssertionError):
        case = random_case((40, 1, 2, 64))
        check_against_float64(run(library, case), case)
