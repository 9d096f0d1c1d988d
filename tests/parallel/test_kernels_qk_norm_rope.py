"""Fused norm and rotary embedding of queries and keys: against float64, torch's special values, and what torch asks."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qk_norm_rope_cases import MAX_POSITION, NORMS, Case, check_against_float64, in_float64, random_case, results

from headrace.errors import ConfigError
from parallel.kernels import extension, qk_norm_rope
from parallel.kernels.choice import choose
from parallel.kernels.qk_norm_rope import DTYPES, HeadNorm, fused, reference

built = pytest.mark.skipif(
    bool(extension.problem_on("qk_norm_rope_forward", "cpu")), reason=f"kernels: {extension.problem()}"
)
norms = pytest.mark.parametrize("norm", NORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def memory_holds_nan() -> Iterator[None]:
    """What torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@built
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 70),
    groups=st.integers(1, 3),
    queries=st.integers(1, 4),
    half=st.integers(1, 70),
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from(DTYPES),
    positions=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    tokens: int,
    groups: int,
    queries: int,
    half: int,
    norm: str,
    dtype: torch.dtype,
    positions: torch.dtype,
    seed: int,
) -> None:
    case = random_case((tokens, groups, queries, 2 * half), norm, dtype, seed, positions)
    check_against_float64(results(fused, case), case)


@built
@pytest.mark.usefixtures("memory_holds_nan")
@norms
@dtypes
@pytest.mark.parametrize(("groups", "queries", "size"), [(8, 2, 64), (2, 4, 80), (4, 4, 128), (1, 2, 256)])
def test_agrees_at_the_sizes_of_models(groups: int, queries: int, size: int, dtype: torch.dtype, norm: str) -> None:
    case = random_case((65, groups, queries, size), norm, dtype)
    check_against_float64(results(fused, case), case)


@norms
def test_reference_is_right_in_float64(norm: str) -> None:
    """Against the definition, head by head, and its gradient by differences."""
    case = in_float64(random_case((5, 2, 2, 6), norm))
    found = reference(case.qkv, case.positions, case.cos, case.sin, case.norm)
    for token in range(5):
        cos, sin = case.cos[case.positions[token]], case.sin[case.positions[token]]
        for head in range(4):
            x = case.qkv[token, head // 2, head % 2]
            if case.norm is not None:
                if case.norm.query_bias is not None:
                    x = x - x.mean()
                x = x / torch.sqrt(x.square().mean() + case.norm.eps) * case.norm.query_weight
                x = x if case.norm.query_bias is None else x + case.norm.query_bias
            a, b = x[:3], x[3:]
            torch.testing.assert_close(found.query[token, head], torch.cat([a * cos - b * sin, b * cos + a * sin]))
    case = in_float64(random_case((2, 1, 2, 4), norm))
    leaves = [case.qkv, *(x for x in (case.norm or ())[:4] if isinstance(x, torch.Tensor))]
    leaves = [x.detach().requires_grad_() for x in leaves]

    def function(qkv: torch.Tensor, *vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = case.norm and HeadNorm(*vectors, *[None] * (4 - len(vectors)), eps=case.norm.eps)
        return reference(qkv, case.positions, case.cos, case.sin, own)[:3]

    assert torch.autograd.gradcheck(function, leaves)


@built
@norms
@dtypes
def test_infinities_and_nan_go_where_torch_sends_them(dtype: torch.dtype, norm: str) -> None:
    case = random_case((30, 1, 2, 16), norm, dtype)
    qkv = case.qkv.clone()
    for token, value in enumerate([float("nan"), float("inf"), -float("inf")]):
        for at in range(3):
            qkv[token * 6 + at, 0, at, 3] = value
        qkv[token * 6 + 3, 0, :, ::2] = value
    grads = tuple(grad.clone() for grad in case.grads)
    for token, value in enumerate([float("nan"), float("inf"), -float("inf")]):
        for grad in grads:
            grad[20 + token, 0, 5] = value
    case = replace(case, qkv=qkv, grads=grads)
    mine, torchs = results(fused, case), results(reference, case)
    for name in mine:
        # a NaN or an infinity spoils the same heads; which of the two may hang on the order of the operations
        assert torch.equal(mine[name].isfinite(), torchs[name].isfinite()), name
        if not name.startswith("grad"):
            assert torch.equal(mine[name].isnan(), torchs[name].isnan()), name


@built
@norms
@dtypes
def test_a_token_does_not_depend_on_its_neighbours_or_threads(dtype: torch.dtype, norm: str) -> None:
    """Bit for bit; the gradients of weights do not depend on threads."""
    case = random_case((203, 2, 3, 64), norm, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(fused, case)
        for number in (2, 3):
            torch.set_num_threads(number)
            assert same_bits(results(fused, case), one)
    finally:
        torch.set_num_threads(threads)
    for token in (0, 31, 32, 202):
        own = replace(
            case,
            qkv=case.qkv[token : token + 1],
            positions=case.positions[token : token + 1],
            grads=tuple(grad[token : token + 1] for grad in case.grads),
        )
        for name, alone in results(fused, own).items():
            if not name.endswith(("weight", "bias")):
                assert torch.equal(alone[0], one[name][token]), name


@built
@dtypes
def test_lengths_are_those_of_the_results_and_bound_logits(dtype: torch.dtype) -> None:
    case = random_case((40, 2, 2, 64), dtype=dtype)
    found = fused(case.qkv, case.positions, case.cos, case.sin, case.norm, with_lengths=True)
    assert found.lengths is not None
    assert not found.lengths.requires_grad
    queries, keys = found.lengths[:, :, :-1].flatten(1), found.lengths[:, :, -1]
    for heads, lengths in ((found.query, queries), (found.key, keys)):
        torch.testing.assert_close(torch.linalg.vector_norm(heads.float(), dim=-1), lengths, rtol=1e-6, atol=0)
    logits = torch.einsum("qhd,kgd->hgqk", found.query.double(), found.key.double())
    assert float(logits.max()) <= float(queries.max() * keys.max()) * (1 + 1e-6)
    assert fused(case.qkv, case.positions, case.cos, case.sin, case.norm).lengths is None


@built
def test_larger_cosines_make_larger_queries() -> None:
    """YaRN's: the rotary table carries its factor."""
    case = random_case((9, 1, 2, 64))
    plain = results(fused, case)
    larger = results(fused, replace(case, cos=case.cos * 1.25, sin=case.sin * 1.25))
    torch.testing.assert_close(larger["query"], plain["query"] * 1.25)
    torch.testing.assert_close(larger["grad_query_weight"], plain["grad_query_weight"] * 1.25)


@built
def test_keeps_the_projection_and_one_number_for_a_head() -> None:
    case = random_case((50, 2, 3, 64))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    qkv = case.qkv.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = fused(qkv, case.positions, case.cos, case.sin, case.norm)
    assert found.value.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    small = case.positions.nbytes + case.cos.nbytes + case.sin.nbytes + 2 * 64 * 4
    assert sum(kept.values()) == qkv.nbytes + small + 4 * 50 * 2 * 4


def changed(case: Case, **changes: torch.Tensor) -> tuple[object, ...]:
    own = {name: changes.pop(name) for name in list(changes) if name in ("qkv", "positions", "cos", "sin")}
    case = replace(case, **own)
    return case.qkv, case.positions, case.cos, case.sin, case.norm and case.norm._replace(**changes)


CASE = random_case((6, 2, 2, 8), "LayerNorm")


@built
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": CASE.qkv.double()}, TypeError, "qkv is torch.float64; it takes torch.float32"),
        ({"qkv": CASE.qkv[:, 0]}, ValueError, "qkv has shape [6, 4, 8]; it must be [tokens, groups"),
        ({"qkv": CASE.qkv[..., :7]}, ValueError, "with an even head size"),
        ({"qkv": CASE.qkv[:, :, :2]}, ValueError, "queries per group + 2"),
        ({"qkv": CASE.qkv.transpose(0, 1)}, ValueError, "qkv of shape [2, 6, 4, 8] has strides"),
        ({"qkv": CASE.qkv.repeat(1, 1, 1, 2)[..., ::2]}, ValueError, "qkv of shape [6, 2, 4, 8] has strides"),
        ({"positions": CASE.positions.float()}, TypeError, "positions are torch.float32; it takes torch.int32"),
        ({"positions": CASE.positions[:5]}, ValueError, "positions has shape [5], expected [6]"),
        ({"cos": CASE.cos[:, :3]}, ValueError, "cos has shape [50, 3], expected [50, 4]"),
        ({"sin": CASE.sin[:9]}, ValueError, "sin has shape [9, 4], expected [50, 4]"),
        ({"cos": CASE.cos.bfloat16()}, TypeError, "cos is torch.bfloat16, qkv torch.float32"),
        ({"query_weight": torch.ones(7)}, ValueError, "query_weight has shape [7], expected [8]"),
        ({"key_bias": torch.ones(16)[::2]}, ValueError, "key_bias of shape [8] has strides [2]"),
        ({"key_weight": torch.ones(8, device="meta")}, ValueError, "key_weight is on meta, qkv on cpu"),
        ({"key_bias": None}, ValueError, "one of query_bias and key_bias is missing"),
    ],
)
def test_what_it_does_not_take_is_refused(
    changes: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    arguments = changed(CASE, **changes)
    with pytest.raises(error) as raised:
        fused(*arguments)  # type: ignore[arg-type]
    assert message in str(raised.value)
    *tensors, norm = arguments
    if any(x.is_meta for x in norm[:4] if x is not None):  # type: ignore[index]
        return
    with pytest.raises(RuntimeError):  # the operator itself checks again
        torch.ops.headrace.qk_norm_rope_forward(*tensors, *norm, False)  # type: ignore[misc]


@built
@pytest.mark.parametrize("position", [-1, MAX_POSITION, 2**40])
def test_positions_outside_the_tables_are_refused(position: int) -> None:
    positions = CASE.positions.clone()
    positions[4] = position
    with pytest.raises(
        RuntimeError, match=rf"position {position} of token 4 is not in cos and sin, which have 50 rows"
    ):
        fused(*changed(CASE, positions=positions))  # type: ignore[arg-type]


@built
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_that_do_not_fit_are_refused(which: int) -> None:
    vectors = CASE.norm[:4] if CASE.norm else ()
    rest = (CASE.qkv, CASE.positions, CASE.cos, CASE.sin)
    statistics = torch.ops.headrace.qk_norm_rope_forward(*rest, *vectors, 1e-5, False)[2]

    def backward(grad: torch.Tensor) -> None:
        grads = [*CASE.grads[:which], grad, *CASE.grads[which + 1 :]]
        torch.ops.headrace.qk_norm_rope_backward(*grads, *rest, *vectors[:2], statistics)

    good = CASE.grads[which]
    backward(good)
    for bad, message in (
        (good[:5], "wrong shape"),
        (good.double(), "wrong dtype"),
        (good.repeat(1, 1, 2)[..., ::2], "must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=rf"qk_norm_rope_backward: .*{message}"):
            backward(bad)


@built
def test_expanded_gradients_and_no_second_derivative() -> None:
    case = random_case((3, 1, 2, 8))
    qkv = case.qkv.clone().requires_grad_()
    rest = (case.positions, case.cos, case.sin, case.norm)
    found = fused(qkv, *rest)
    (found.query.sum() + found.key.sum() + found.value.sum()).backward()  # expanded gradients, of stride 0
    ones = replace(case, grads=tuple(torch.ones_like(grad) for grad in case.grads))
    assert qkv.grad is not None
    torch.testing.assert_close(qkv.grad, results(fused, ones)["grad_qkv"])
    (grad,) = torch.autograd.grad(fused(qkv, *rest).query.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@built
def test_one_of_the_results_alone_has_a_gradient() -> None:
    case = random_case((7, 2, 2, 8))
    for which in range(3):
        grads = tuple(grad if at == which else torch.zeros_like(grad) for at, grad in enumerate(case.grads))
        qkv = case.qkv.clone().requires_grad_()
        found = fused(qkv, case.positions, case.cos, case.sin, case.norm)
        (alone,) = torch.autograd.grad(found[which], qkv, case.grads[which])
        assert torch.equal(alone, results(fused, replace(case, grads=grads))["grad_qkv"])


@built
@norms
@pytest.mark.parametrize("tokens", [5, 0])
def test_torch_finds_the_operators_sound(tokens: int, norm: str) -> None:
    case = random_case((tokens, 2, 2, 10), norm)
    rest = (case.qkv, case.positions, case.cos, case.sin)
    vectors = case.norm[:4] if case.norm else [None] * 4
    operators = torch.ops.headrace
    torch.library.opcheck(operators.qk_norm_rope_forward, (*rest, *vectors, 1e-5, True))
    statistics = operators.qk_norm_rope_forward(*rest, *vectors, 1e-5, False)[2]
    torch.library.opcheck(operators.qk_norm_rope_backward, (*case.grads, *rest, *vectors[:2], statistics))


@built
@norms
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(norm: str, dynamic: bool) -> None:
    torch._dynamo.reset()  # it gives up on functions that it compiled eight times
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (4, 7):
        case = random_case((tokens, 2, 2, 12), norm)
        assert same_bits(results(compiled, case), results(fused, case))


@built
def test_the_choice_says_why() -> None:
    assert choose(qk_norm_rope.KERNEL, "auto", "cpu") == ("fused", "faster than torch on cpu")
    assert choose(qk_norm_rope.KERNEL, "auto", "cuda")[0] == "torch"
    assert choose(qk_norm_rope.KERNEL, "torch", "cpu") == ("torch", "asked for")


@built
def test_a_library_built_before_an_operator_was_there_is_no_error() -> None:
    assert extension.problem_on("no_such_operator", "cpu").startswith(
        "the library that was built is older than no_such_operator; pip install"
    )


def test_without_the_library_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "problem", lambda: "not built")
    assert choose(qk_norm_rope.KERNEL, "auto", "cpu") == ("torch", "not built")
    with pytest.raises(ConfigError, match=r"kernels\.qk_norm_rope: fused is not available on cpu: not built"):
        choose(qk_norm_rope.KERNEL, "fused", "cpu")
