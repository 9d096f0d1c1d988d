"""Every layout trains as one process does: loss and gradient norm of five steps, under every pair of model options.

The figures go into `docs/parallel.md` through `benchmarks/parallel_equivalence.py`, which runs this file.
"""

import functools
import itertools
import math
from collections.abc import Callable

import pytest
from layout_matrix import LAYOUTS, OPTIONS, PAIRS, VARIANTS, matrix_state, rows_of, steps_of, variant_name
from process_group import run_ranks

from parallel import process_groups
from parallel.layout import Layout

STEPS = 5
TOLERANCE = 1e-5
Curve = list[tuple[float, float, list[int], list[int]]]
"""(loss, gradient norm, tokens by source, summed losses by source) of each step."""


def curves(layout: Layout, variants: tuple[dict[str, object], ...]) -> list[Curve]:
    """Of a fresh run of every variant, in this process."""
    ranks = process_groups.initialize(layout, seed=1, timeout_s=120)
    found = []
    for variant in variants:
        results = steps_of(matrix_state(variant, layout, ranks), 0, STEPS)
        assert not any(result.skipped for result in results)
        found.append([(r.loss, r.grad_norm, r.source_tokens.tolist(), r.source_loss_sums.tolist()) for r in results])
    if layout.world_size == 1:
        process_groups.shutdown()
    return found


@functools.cache
def single_process(variant: tuple[tuple[str, object], ...]) -> Curve:
    return curves(Layout(1), (dict(variant),))[0]


def largest_deviation(mine: Curve, reference: Curve) -> tuple[float, float]:
    """The largest relative difference over the steps of (loss, gradient norm)."""
    pairs = list(zip(mine, reference, strict=True))
    assert all(here[2] == there[2] for here, there in pairs), "other tokens were trained on"
    loss, norm = (max(abs(here[at] - there[at]) / abs(there[at]) for here, there in pairs) for at in (0, 1))
    return loss, norm


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_process(name: str, record_property: Callable[[str, object], None]) -> None:
    entry, rows = LAYOUTS[name], rows_of(name)
    variants = entry.variants(rows)
    ranks = run_ranks(entry.layout.world_size, curves, entry.layout, variants, timeout_s=300)
    assert all(other == ranks[0] for other in ranks[1:]), "ranks do not agree on what happened"
    record_property("layout", name)
    for row, variant, mine in zip(rows, variants, ranks[0], strict=True):
        loss, norm = largest_deviation(mine, single_process(tuple(variant.items())))
        model = variant_name(VARIANTS[row])
        record_property(model, f"{loss:.2e} {norm:.2e}")
        assert loss <= TOLERANCE, f"{name}, {model}: loss"
        assert norm <= TOLERANCE, f"{name}, {model}: gradient norm"


@pytest.mark.parametrize("at", range(len(PAIRS)))
def test_two_layouts_in_a_row_have_every_value_between_them(at: int) -> None:
    rows = PAIRS[at] + PAIRS[(at + 1) % len(PAIRS)]
    for option in OPTIONS:
        every = {variant[option] for variant in VARIANTS}
        assert len({VARIANTS[row][option] for row in rows}) >= min(2, len(every)), option
    assert {VARIANTS[row]["recompute"] for pair in PAIRS for row in pair} == {v["recompute"] for v in VARIANTS}


def test_the_variants_pair_every_two_options() -> None:
    for one, other in itertools.combinations(OPTIONS, 2):
        seen = {(variant[one], variant[other]) for variant in VARIANTS}
        wanted = math.prod(len({variant[option] for variant in VARIANTS}) for option in (one, other))
        assert len(seen) == wanted, f"{one} and {other}"
