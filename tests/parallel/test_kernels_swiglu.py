"""Fused SwiGLU against float64, torch's special values, and everything torch asks of an operator."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from parallel.kernels import extension, swiglu
from parallel.kernels.choice import available, choose

ROOT = Path(extension.FOLDER).parents[1]
built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")

# Off by at most this, relative: rounding once (bf16 2^-9), or a handful of fp32 roundings.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 2**-8}
Forward = Callable[[torch.Tensor], torch.Tensor]


def gradient(form: Forward, gate_up: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, gradient of gate_up)."""
    gate_up = gate_up.detach().clone().requires_grad_()
    hidden = form(gate_up)
    hidden.backward(grad)
    assert gate_up.grad is not None
    return hidden.detach(), gate_up.grad


def random_pair(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up of `shape` and a gradient for its hidden; a wide range of sizes, so that all parts of exp are met."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(shape, generator=generator, dtype=torch.float64) * 8
    grad = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.float64)
    return gate_up.to(dtype), grad.to(dtype)


def check_against_float64(gate_up: torch.Tensor, grad: torch.Tensor) -> None:
    hidden, grad_gate_up = gradient(swiglu.fused, gate_up, grad)
    true_hidden, true_grad = gradient(swiglu.reference, gate_up.double(), grad.double())
    assert hidden.dtype == grad_gate_up.dtype == gate_up.dtype
    assert hidden.shape == grad.shape
    tolerance = TOLERANCE[gate_up.dtype]
    torch.testing.assert_close(hidden.double(), true_hidden, rtol=tolerance, atol=1e-30)
    # 1 + g (1 - sigmoid) is a difference of numbers near 1 where g is near -1.28: absolute there, relative elsewhere
    gate, up = gate_up.double().chunk(2, dim=-1)
    scale = torch.cat([(grad.double() * up * torch.sigmoid(gate)).abs(), torch.zeros_like(gate)], dim=-1)
    off = (grad_gate_up.double() - true_grad).abs()
    assert bool((off <= tolerance * true_grad.abs() + 1e-6 * scale + 1e-30).all())


def test_the_kernels_are_built_from_these_sources() -> None:
    """Where they can be built they are, or the tests below would be skipped unseen."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler here, so the package computes with torch")
    assert extension.problem() == ""
    library = max(path.stat().st_mtime for path in extension.FOLDER.glob("_C*.so"))
    newer = [path.name for path in (ROOT / "csrc").glob("*.*") if path.stat().st_mtime > library]
    assert not newer, f"changed since the kernels were built; {extension.HOW_TO_BUILD}"


@built
@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=2),
    width=st.integers(0, 300),
    dtype=st.sampled_from(swiglu.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(shape: list[int], width: int, dtype: torch.dtype, seed: int) -> None:
    check_against_float64(*random_pair(seed, (*shape, 2 * width), dtype))


@built
@pytest.mark.parametrize("dtype", swiglu.DTYPES)
def test_agrees_with_float64_over_every_size_of_gate(dtype: torch.dtype) -> None:
    """All 65,536 bf16 numbers that are finite, as gates."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()].to(dtype)
    gate_up = torch.stack([gate, torch.full_like(gate, 0.75)], dim=-1)
    near, far = gate_up[gate > -80], gate_up[gate <= -80]
    check_against_float64(near, torch.full((len(near), 1), 0.5, dtype=dtype))
    hidden, grad = gradient(swiglu.fused, far, torch.ones(len(far), 1, dtype=dtype))
    assert float(hidden.abs().max()) < 1e-32  # near the end of fp32's range, and past it
    assert float(grad.abs().max()) < 1e-32


@built
@pytest.mark.parametrize("dtype", swiglu.DTYPES)
def test_infinities_and_nan_go_where_torch_sends_them(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 100.0, -100.0, 3e38, -3e38, 1e-38], dtype=dtype)
    gate, up, grad = (grid.reshape(-1, 1) for grid in torch.meshgrid(values, values, values, indexing="ij"))
    for mine, torchs in zip(
        gradient(swiglu.fused, torch.cat([gate, up], dim=-1), grad),
        gradient(swiglu.reference, torch.cat([gate, up], dim=-1), grad),
        strict=True,
    ):
        assert torch.equal(mine.isnan(), torchs.isnan())
        assert torch.equal(mine.isinf(), torchs.isinf())
        assert torch.equal(mine[mine.isinf()], torchs[torchs.isinf()])


@built
@pytest.mark.parametrize("dtype", swiglu.DTYPES)
def test_a_number_does_not_depend_on_its_neighbours_or_threads(dtype: torch.dtype) -> None:
    """Bit for bit: vector lanes, loop ends, rows and threads all compute alike."""
    gate_up, grad = random_pair(3, (300, 2 * 331), dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # 99,300 numbers: enough for three of them
        whole = gradient(swiglu.fused, gate_up, grad)
    finally:
        torch.set_num_threads(threads)
    for name, alone in {
        "rows": [gradient(swiglu.fused, gate_up[i : i + 1], grad[i : i + 1]) for i in range(300)],
        "columns": [gradient(swiglu.fused, gate_up[:, [i, 331 + i]], grad[:, [i]]) for i in range(331)],
    }.items():
        dim = 0 if name == "rows" else -1
        assert torch.equal(torch.cat([hidden for hidden, _ in alone], dim=dim), whole[0]), name
        if name == "rows":
            assert torch.equal(torch.cat([each for _, each in alone]), whole[1])
        else:
            halves = [torch.cat([each[:, half : half + 1] for _, each in alone], dim=-1) for half in (0, 1)]
            assert torch.equal(torch.cat(halves, dim=-1), whole[1])


@built
@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, "shape [3, 5]; the last dimension is gate and up, so even"),
        (torch.tensor(1.0), ValueError, "shape []"),
        (torch.zeros(3, 4, dtype=torch.float64), TypeError, "gate_up is torch.float64; it takes torch.float32"),
        (torch.zeros(3, 4, dtype=torch.float16), TypeError, "torch.float16"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "torch.int64"),
        (torch.zeros(4, 3).t(), ValueError, "has strides [1, 3]; call .contiguous() on it"),
        (torch.zeros(3, 8)[:, ::2], ValueError, "strides [8, 2]"),
    ],
)
def test_what_it_does_not_take_is_refused(gate_up: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        swiglu.fused(gate_up)
    assert message in str(raised.value)
    with pytest.raises(RuntimeError, match="headrace::swiglu_forward: "):  # the operator itself checks again
        torch.ops.headrace.swiglu_forward(gate_up)


@built
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 3), "half its last dimension"),
        (torch.zeros(3, 2), "half its last dimension"),
        (torch.zeros(6), "half its last dimension"),
        (torch.tensor(1.0), "half its last dimension"),
        (torch.zeros(3, 3, dtype=torch.bfloat16), "same dtype"),
        (torch.zeros(3, 3).t(), "grad must be contiguous"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.headrace.swiglu_backward(grad, torch.zeros(3, 6))


@built
def test_expanded_gradients_and_no_second_derivative() -> None:
    gate_up = torch.randn(3, 8, requires_grad=True)
    swiglu.fused(gate_up).sum().backward()  # an expanded gradient, of stride 0
    assert gate_up.grad is not None
    torch.testing.assert_close(gate_up.grad, gradient(swiglu.reference, gate_up, torch.ones(3, 4))[1])
    (grad,) = torch.autograd.grad(swiglu.fused(gate_up).sum(), gate_up, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@built
@pytest.mark.parametrize("dtype", swiglu.DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 14), (0, 6)])
def test_torch_finds_the_operators_sound(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up, grad = random_pair(0, shape, dtype)
    torch.library.opcheck(torch.ops.headrace.swiglu_forward, (gate_up.requires_grad_(),))
    torch.library.opcheck(torch.ops.headrace.swiglu_backward, (grad, gate_up.detach()))


@built
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(swiglu.fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        gate_up, grad = random_pair(rows, (rows, 2, 12), torch.float32)
        for mine, eager in zip(gradient(compiled, gate_up, grad), gradient(swiglu.fused, gate_up, grad), strict=True):
            assert torch.equal(mine, eager)


def test_reference_is_right_in_float64() -> None:
    gate_up = random_pair(1, (4, 6), torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(swiglu.reference, (gate_up,))
    gate, up = gate_up.detach().chunk(2, dim=-1)
    torch.testing.assert_close(swiglu.reference(gate_up.detach()), gate / (1 + torch.exp(-gate)) * up)


@built
def test_the_choice_says_why() -> None:
    assert choose(swiglu.KERNEL, "torch", "cpu") == ("torch", "asked for")
    assert choose(swiglu.KERNEL, "fused", "cpu") == ("fused", "asked for")
    assert choose(swiglu.KERNEL, "auto", "cpu") == ("fused", "faster than torch on cpu")
    assert available("cpu")["swiglu"] == "fused: faster than torch on cpu"
    assert available("cuda")["swiglu"].startswith("torch: ")


def test_without_the_library_it_is_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extension.problem.cache_clear()
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    try:
        assert choose(swiglu.KERNEL, "auto", "cpu")[0] == "torch"
        assert available("cpu")["swiglu"].startswith("torch: not built; pip install")
        with pytest.raises(ConfigError, match=r"kernels\.swiglu: fused is not available on cpu: not built"):
            choose(swiglu.KERNEL, "fused", "cpu")
        extension.problem.cache_clear()
        (tmp_path / "_C.abi3.so").write_bytes(os.urandom(64))  # a library for another machine, say
        assert "_C.abi3.so does not load into torch" in choose(swiglu.KERNEL, "auto", "cpu")[1]
    finally:
        extension.problem.cache_clear()
