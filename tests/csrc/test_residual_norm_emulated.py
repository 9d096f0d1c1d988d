"""The CUDA kernels of residual addition and norm on the emulator: the same bits under every schedule, right by float64,
nothing written beside."""

from typing import Any

import emulated
import pytest
import torch

from parallel.kernels import residual_norm

pytestmark = emulated.needs_emulator

# (rows, width): one pack for each thread of a block and less, rows that end inside a warp, two and four packs for each
# thread, more than registers hold (fp32 8,192, bf16 16,384 forward and 8,192 backward), and rows not made of packs.
SHAPES = [(1, 1), (3, 5), (7, 8), (9, 264), (3, 1030), (5, 2056), (3, 5128), (2, 8192), (2, 16896), (0, 16)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.load("residual_norm")


def inputs_of(
    rows: int, width: int, dtype: torch.dtype, weights: torch.dtype, offset: int = 0
) -> dict[str, torch.Tensor]:
    """Everything forward and backward take, off 16-byte boundaries by `offset` numbers, between canaries."""
    generator = torch.Generator().manual_seed(rows * width)
    made = {}
    for name in ("x", "residual", "grad_normalised", "grad_stream", "weight", "bias"):
        shape, kind = ((width,), weights) if name in ("weight", "bias") else ((rows, width), dtype)
        made[name] = emulated.guarded(shape, kind, offset)
        made[name].copy_(torch.randn(shape, generator=generator) + (name == "x"))
    return made


def run(ops: Any, given: dict[str, torch.Tensor], residual: bool, layer_norm: bool) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name; `rstd`, `mean` and `square_sum` among them."""
    stream = [given["x"], given["residual"]] if residual else [given["x"]]
    weights = [given["weight"], given["bias"]] if layer_norm else [given["weight"]]
    kind = "layer_norm" if layer_norm else "rms_norm"
    forward = getattr(ops, f"residual_{kind}_forward" if residual else f"{kind}_forward")
    normalised, *rest = forward(*stream, *weights, 1e-5)
    summed = rest.pop(0) if residual else given["x"]
    *statistics, square_sum = rest
    grads = getattr(ops, f"{kind}_backward")(
        given["grad_normalised"], given["grad_stream"] if residual else None, summed, given["weight"], *statistics
    )
    names = ("grad", "grad_weight", "grad_bias")
    return {
        "normalised": normalised,
        "stream": summed,
        "square_sum": square_sum,
        **dict(zip(names, grads, strict=False)),
    }


def true(
    given: dict[str, torch.Tensor], stream: torch.Tensor, residual: bool, layer_norm: bool
) -> dict[str, torch.Tensor]:
    """The same in float64, from the stream as it was rounded."""
    x, weight, bias = (each.double().requires_grad_() for each in (stream, given["weight"], given["bias"]))
    normalised, _ = residual_norm.reference(x, None, weight, bias if layer_norm else None)
    normalised.backward(given["grad_normalised"].double())
    assert x.grad is not None
    grad = x.grad + given["grad_stream"].double() if residual else x.grad
    expected = {"normalised": normalised.detach(), "square_sum": stream.double().square().sum(-1), "grad": grad}
    for name, parameter in {"grad_weight": weight, "grad_bias": bias}.items():
        if parameter.grad is not None:
            expected[name] = parameter.grad
    return expected


def check(kernels: emulated.Emulated, given: dict[str, torch.Tensor], residual: bool, layer_norm: bool) -> None:
    found = emulated.under_every_schedule(kernels, lambda: run(kernels.ops, given, residual, layer_norm), seeds=1)
    rounded = given["x"] + given["residual"] if residual else given["x"]
    assert torch.equal(found["stream"], rounded)
    for name, expected in true(given, found["stream"], residual, layer_norm).items():
        tolerance = TOLERANCE[found[name].dtype]
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found[name].double(), expected, rtol=tolerance, atol=tolerance * largest / 4 + 1e-12)
    emulated.check_canaries(*given.values())


@pytest.mark.parametrize("layer_norm", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", residual_norm.DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_agrees_with_float64(
    kernels: emulated.Emulated, rows: int, width: int, dtype: torch.dtype, layer_norm: bool
) -> None:
    check(kernels, inputs_of(rows, width, dtype, dtype), residual=True, layer_norm=layer_norm)


@pytest.mark.parametrize("layer_norm", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("residual", [False, True], ids=["norm alone", "with residual"])
@pytest.mark.parametrize(
    ("dtype", "weights", "offset"),
    [
        (torch.bfloat16, torch.float32, 0),
        (torch.float32, torch.bfloat16, 0),
        (torch.bfloat16, torch.bfloat16, 1),
        (torch.float32, torch.float32, 3),
    ],
    ids=["bf16, fp32 weights", "fp32, bf16 weights", "bf16 off by one", "fp32 off by three"],
)
def test_weights_of_another_dtype_and_addresses_that_fit_no_pack(
    kernels: emulated.Emulated,
    dtype: torch.dtype,
    weights: torch.dtype,
    offset: int,
    residual: bool,
    layer_norm: bool,
) -> None:
    check(kernels, inputs_of(6, 520, dtype, weights, offset), residual, layer_norm)


def test_more_rows_than_blocks_and_not_a_number(kernels: emulated.Emulated) -> None:
    """The emulated GPU has two multiprocessors, so blocks take many rows each; NaN stays in its row and its column."""
    given = inputs_of(70, 264, torch.bfloat16, torch.float32)
    check(kernels, given, residual=True, layer_norm=True)
    clean = run(kernels.ops, given, residual=True, layer_norm=False)
    given["x"][3, 5] = float("nan")
    marked = run(kernels.ops, given, residual=True, layer_norm=False)
    for name in ("normalised", "grad", "square_sum"):
        assert marked[name][3].isnan().all(), name
        others = [row for row in range(70) if row != 3]
        assert torch.equal(marked[name][others], clean[name][others]), name
    assert marked["grad_weight"].isnan().all()
