"""Fused AdamW against float64, against torch's kernel bit for bit, and in each form of a weight."""

import functools
import itertools
import math

import pytest
import torch
from adamw_cases import FORMS, Case, case, masters, split
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.kernels import adamw, extension

pytestmark = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
DTYPES = (torch.float32, torch.bfloat16)
INF, NAN = float("inf"), float("nan")


def update(case: Case, form=adamw.fused, **options: object) -> torch.Tensor:  # type: ignore[no-untyped-def]
    result: torch.Tensor = form(*case.lists, case.groups, lows=case.lows, bases=case.bases, **options)
    return result


def norm_of(number: float) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.float64)


def same(ours: Case, theirs: Case) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours.changed, theirs.changed, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.integers(0, 200) | st.sampled_from([1023, 1024, 1025, 4099, 16384, 16385]), min_size=1, max_size=5
    ),
    gradient=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    step=st.integers(1, 10**6),
    clip=st.booleans(),
)
def test_masters_agree_with_float64(sizes: list[int], gradient: torch.dtype, seed: int, step: int, clip: bool) -> None:
    mine = case("copy", sizes, gradient, seed, step)
    for low in mine.lows:
        low.fill_(NAN)
    true, before = mine.doubled(), mine.doubled().weights
    options = {"grad_norm": norm_of(7.0), "max_norm": 0.5 if clip else 0.0, "sums": True}
    sums, true_sums = update(mine, **options), update(true, adamw.reference, **options)
    # 1e-6 of a weight of 1 is 8 of its last places; an update of 1e-2 is exact to 1e-8
    for tensors in ("exp_avgs", "exp_avg_sqs"):
        for ours, exact in zip(getattr(mine, tensors), getattr(true, tensors), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=3e-8)
    for ours, exact, old in zip(mine.weights, true.weights, before, strict=True):
        # Where the second moment is next to nothing an update is large, and may leave little of a weight.
        assert ((ours.double() - exact).abs() <= 3e-8 + 3e-6 * (exact.abs() + (exact - old).abs())).all()
    for weight, low in zip(mine.weights, mine.lows, strict=True):
        assert torch.equal(low, weight.bfloat16())
    # a change is a difference of weights, each of which is rounded: by 1e-7 of those that are above 1
    size = torch.tensor(sizes, dtype=torch.float64)[:, None]
    assert ((sums - true_sums).abs() <= 1e-12 + 1e-3 * true_sums + 4e-7 * (true_sums * size).sqrt()).all()
    torch.testing.assert_close(sums[:, ::2], true_sums[:, ::2], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_five_steps_have_the_bits_of_torchs_kernel(max_norm: float, weight_decay: float, beta1: float) -> None:
    """Where torch uses AVX2 or AVX-512 and sizes are multiples of their vectors; elsewhere to rounding."""
    mine = case("master", [16 * 1000, 16 * 77])
    theirs = mine.copy()
    steps = [torch.tensor(2.0) for _ in theirs.weights]
    generator = torch.Generator().manual_seed(5)
    for step in range(3, 8):
        mine.gradients = [torch.randn(len(each), generator=generator) for each in mine.weights]
        mine.groups = [adamw.Group(2, 1e-3 * step, weight_decay, beta1, 0.95, 1e-8, step)]
        norm = math.sqrt(sum(float(each.double().square().sum()) for each in mine.gradients))
        update(mine, grad_norm=norm_of(norm), max_norm=max_norm)
        scale = max_norm / (norm + 1e-6)
        clipped = [each * scale if 0.0 < scale < 1.0 else each for each in mine.gradients]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            *(theirs.weights, clipped, theirs.exp_avgs, theirs.exp_avg_sqs, [], steps),
            lr=1e-3 * step,
            beta1=beta1,
            beta2=0.95,
            weight_decay=weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert same(mine, theirs) or not vectors
    for ours, other in zip(mine.changed, theirs.changed, strict=True):
        torch.testing.assert_close(ours, other, rtol=3e-6, atol=3e-8)


@pytest.mark.parametrize("gradient", DTYPES)
def test_remainders_keep_the_masters_of_fp32(gradient: torch.dtype) -> None:
    """Over twenty steps the two halves are the fp32 master bit for bit, and the weight is it rounded."""
    plain = case("master", [40_000, 1001], gradient)
    halves = plain.copy()
    halves.weights, halves.lows = (list(each) for each in zip(*map(split, plain.weights), strict=True))
    for step in range(1, 21):
        for each in (plain, halves):
            each.groups = [group._replace(step=step) for group in each.groups]
            update(each, seed=step)
        for master, joined, weight in zip(plain.weights, masters(halves), halves.weights, strict=True):
            assert torch.equal(master, joined)
            assert torch.equal(weight, split(master)[0])
            assert float((weight != master.bfloat16()).float().mean()) < 1e-3  # other than ties to even in ties only


def test_the_remainder_and_random_forms_are_the_references() -> None:
    """Bit for bit where the arithmetic is: a gradient and moments of zero leave weight decay alone."""
    for form in ("remainder", "stochastic"):
        mine = case(form, [3000, 17])
        for tensors in (mine.gradients, mine.exp_avgs, mine.exp_avg_sqs):
            for tensor in tensors:
                tensor.zero_()
        theirs = mine.copy()
        sums = update(mine, seed=2**62 + 5, sums=True)
        torch.testing.assert_close(
            update(theirs, adamw.reference, seed=2**62 + 5, sums=True), sums, rtol=1e-6, atol=0.0
        )
        assert same(mine, theirs), form


def test_random_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    """A weight of 1 that falls by a tenth of the distance to the next bf16 lands there in a tenth of cases."""
    size, below = 200_000, 1.0 - 2**-8
    landed = []
    for step in (1, 2):
        weights = [torch.ones(size, dtype=torch.bfloat16)]
        zeros = [[torch.zeros(size)] for _ in range(3)]
        group = adamw.Group(1, 0.1 * 2**-8, 1.0, 0.9, 0.95, 1e-8, step)
        adamw.fused(weights, *zeros, [group], bases=[0], seed=3)
        assert set(weights[0].unique().tolist()) == {below, 1.0}
        landed.append(weights[0] != 1.0)
        assert float(landed[-1].float().mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / size))
    both = float((landed[0] & landed[1]).float().mean())  # steps are independent, and so are neighbours
    assert both == pytest.approx(0.01, abs=0.001)
    assert float((landed[0][1:] & landed[0][:-1]).float().mean()) == pytest.approx(0.01, abs=0.001)


def test_random_rounding_does_not_depend_on_the_sharding() -> None:
    whole = case("stochastic", [10_000])
    whole.groups, whole.bases = whole.groups[:1], [123]
    cuts = [0, 3, 4096, 7001, 10_000]

    def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[start:end].clone() for start, end in itertools.pairwise(cuts)]

    parts = Case(*map(pieces, next(zip(*whole.lists, strict=True))), groups=[whole.groups[0]._replace(tensors=4)])
    parts.bases = [123 + start for start in cuts[:-1]]
    update(whole, seed=9)
    update(parts, seed=9)
    assert torch.equal(torch.cat(parts.weights), whole.weights[0])
    update(other := case("stochastic", [10_000]), seed=10)
    assert not torch.equal(other.weights[0], whole.weights[0])


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("form", FORMS)
def test_a_norm_that_is_not_finite_changes_nothing(form: str, bad: float) -> None:
    mine = case(form, [70, 3])
    before = mine.copy()
    assert update(mine, grad_norm=norm_of(bad), max_norm=1.0, sums=True).tolist() == [[0.0] * 3] * 2
    assert same(mine, before)


@pytest.mark.parametrize("form", FORMS)
def test_infinities_and_nan_go_where_torch_sends_them(form: str) -> None:
    values = [NAN, INF, -INF, 0.0, -0.0, 1.0, 3e38, -3e38, 1e-42]
    grid = torch.cartesian_prod(*[torch.tensor(values)] * 3)
    squares = torch.tensor([0.0, 1.0, INF, NAN]).repeat_interleave(len(grid))
    weight, gradient, mean = (column.repeat(4).contiguous() for column in grid.unbind(1))
    mine = case(form, [len(squares)])
    mine.groups, mine.bases = mine.groups[:1], mine.bases[:1]
    mine.gradients, mine.exp_avgs, mine.exp_avg_sqs = [gradient], [mean], [squares]
    mine.weights = [weight.to(mine.weights[0].dtype)]
    if form == "remainder":
        mine.weights, mine.lows = ([each] for each in split(torch.where(weight.isnan(), INF, weight)))
    theirs = mine.copy()
    update(mine)
    update(theirs, adamw.reference)
    for ours, others in zip(
        [*masters(mine), *mine.exp_avgs, *mine.exp_avg_sqs, *(mine.lows if form == "copy" else [])],
        [*masters(theirs), *theirs.exp_avgs, *theirs.exp_avg_sqs, *(theirs.lows if form == "copy" else [])],
        strict=True,
    ):
        assert torch.equal(ours.isnan(), others.isnan())
        assert torch.equal(ours[ours.isinf()], others[others.isinf()])
    assert torch.equal(mine.weights[0].isnan(), masters(mine)[0].isnan())  # though NaN's halves are no number's


@pytest.mark.parametrize("form", FORMS)
def test_threads_and_neighbours_change_no_bit(form: str) -> None:
    """Nor does a call for each tensor in place of one for all."""
    start = case(form, [100_003, 1, 20_000, 16_384, 5])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            each = start.copy()
            results.append((update(each, sums=True, grad_norm=norm_of(2.0), max_norm=1.0), each))
    finally:
        torch.set_num_threads(threads)
    alone, settings = start.copy(), [group for group in start.groups for _ in range(group.tensors)]
    rows = []
    for i, group in enumerate(settings):
        lists = [[tensors[i]] for tensors in alone.lists]
        lows = alone.lows[i : i + 1]
        options = {"lows": lows, "bases": [alone.bases[i]], "grad_norm": norm_of(2.0), "max_norm": 1.0, "sums": True}
        rows.append(adamw.fused(*lists, [group._replace(tensors=1)], **options))  # type: ignore[arg-type]
    results.append((torch.cat(rows), alone))
    for sums, each in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert same(each, results[0][1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": []}, ValueError, "there is no weight"),
        ({"gradients": [torch.zeros(6)]}, ValueError, "gradients has 1 tensors, weights 2"),
        ({"gradients": [torch.zeros(6), torch.zeros(3)]}, ValueError, "gradients[1] has 3 numbers, its weight 4"),
        ({"gradients": [torch.zeros(6), torch.zeros(4).half()]}, TypeError, "gradients[1] is torch.float16"),
        ({"gradients": [torch.zeros(6), torch.zeros(4).bfloat16()]}, TypeError, "for all of gradients"),
        ({"weights": [torch.zeros(6).double(), torch.zeros(4).double()]}, TypeError, "weights[0] is torch.float64"),
        ({"exp_avgs": [torch.zeros(6), torch.zeros(4).bfloat16()]}, TypeError, "exp_avgs[1] is torch.bfloat16"),
        ({"exp_avg_sqs": [torch.zeros(12)[::2], torch.zeros(4)]}, ValueError, "exp_avg_sqs[0] has strides [2]"),
        ({"lows": [torch.zeros(6), torch.zeros(4)]}, TypeError, "lows[0] is torch.float32; it takes torch.bfloat16"),
        ({"lows": [torch.zeros(6).bfloat16()]}, ValueError, "lows has 1 tensors"),
        ({"groups": [adamw.Group(3, 0.1, 0.0, 0.9, 0.9, 1e-8, 1)]}, ValueError, "groups are for 3 of 2 tensors"),
        ({"groups": []}, ValueError, "groups are for 0 of 2 tensors"),
        ({"bases": [0]}, ValueError, "bases has 1 numbers, not 2"),
        ({"gradients": [torch.zeros(6), torch.zeros(4, device="meta")]}, ValueError, "gradients[1] is on meta"),
    ],
)
def test_what_it_does_not_take_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    mine = case("master", [6, 4])
    mine.groups = [adamw.Group(2, 0.1, 0.0, 0.9, 0.9, 1e-8, 1)]
    mine.__dict__.update(change)
    before = mine.copy() if error is ValueError and "strides" not in message and "meta" not in message else None
    with pytest.raises(error) as raised:
        update(mine)
    assert message in str(raised.value)
    assert before is None or same(mine, before)


@pytest.mark.parametrize("norm", [torch.tensor([1.0]), torch.ones(2, dtype=torch.float64)])
def test_a_norm_of_another_kind_is_refused(norm: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"grad_norm is torch\.float\d\d of [12] numbers; it takes one torch\.float64"):
        update(case("master", [6, 4]), grad_norm=norm)


@pytest.mark.parametrize("form", FORMS)
def test_torch_finds_the_operator_sound(form: str) -> None:
    each = case(form, [33, 7])
    numbers = torch.tensor([group[1:] for group in each.groups], dtype=torch.float64)
    lists = [each.weights, each.lows, each.gradients, each.exp_avgs, each.exp_avg_sqs]
    torch.library.opcheck(torch.ops.headrace.adamw_, (*lists, numbers, [1, 1], each.bases, norm_of(3.0), 1.0, 5, True))


def test_compiles_into_one_graph() -> None:
    eager, compiled = case("copy", [33, 7]), case("copy", [33, 7])
    function = functools.partial(adamw.fused, groups=eager.groups, lows=compiled.lows, max_norm=1.0, sums=True)
    sums = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled.lists, grad_norm=norm_of(3.0))
    assert torch.equal(update(eager, max_norm=1.0, sums=True, grad_norm=norm_of(3.0)), sums)
    assert same(eager, compiled)
