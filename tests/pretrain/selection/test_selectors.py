"""Which tokens the built-in selectors choose, held against numbers worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest

from headrace.errors import ConfigError
from pretrain.selection import Scored, make_selector
from pretrain.selection.top import fixed


def top_here(values: Any, share: float) -> Any:
    """`Top`'s definition, on one rank."""
    whole = fixed(values)
    if not len(whole):
        return np.zeros(0, np.bool_)
    count = max(1, math.ceil(share * len(whole) - 1e-9))
    return whole >= np.sort(whole)[-count]


def scored(losses: list[float], documents: list[int], reference: list[float] | None = None) -> Scored:
    return Scored(
        step=3,
        losses=np.array(losses),
        reference=None if reference is None else np.array(reference),
        documents=np.array(documents),
        sources=np.zeros(len(losses), np.int64),
    )


# Documents 0, 2 and 5 (1, 3 and 4 carry no loss) with means 2.0, 0.5 and 3.0.
LOSSES, DOCUMENTS = [1.0, 3.0, 0.25, 0.75, 0.5, 3.0], [0, 0, 2, 2, 2, 5]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"below": 2.0}, {0, 5}),
        ({"below": 2.1}, {5}),
        ({"below": 0}, {0, 2, 5}),
        ({"below": 9.0}, set()),
        ({"share": 0.0}, {0, 2, 5}),
        ({"share": 1 / 3}, {0, 5}),
        ({"share": 0.5}, {0, 5}),
        ({"share": 0.7}, {5}),
    ],
)
def test_documents_below_a_threshold_are_left_out(options: dict[str, float], kept: set[int]) -> None:
    chosen = make_selector("loss_threshold", options).select(scored(LOSSES, DOCUMENTS), top_here)
    assert chosen.tolist() == [document in kept for document in DOCUMENTS]


def test_rho1_keeps_the_tokens_of_largest_excess_loss() -> None:
    """Excess losses 0.5, -1, 0.25, 0.75, 0, -0.5: the largest 60 % of six are four, 50 % are three."""
    losses = [2.5, 1.0, 4.25, 0.75, 3.0, 0.5]
    reference = [2.0, 2.0, 4.0, 0.0, 3.0, 1.0]
    given = scored(losses, [0, 0, 1, 1, 2, 2], reference)
    assert make_selector("rho1", {"share": 0.6}).select(given, top_here).tolist() == [1, 0, 1, 1, 1, 0]
    assert make_selector("rho1", {"share": 0.5}).select(given, top_here).tolist() == [1, 0, 1, 1, 0, 0]
    assert make_selector("rho1", {"share": 1}).select(given, top_here).all()
    assert make_selector("rho1", {}).needs_reference


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("loss_treshold", {}, r"no selector 'loss_treshold' \(known: loss_threshold, rho1\)"),
        ("loss_threshold", {}, "give below .* or share"),
        ("loss_threshold", {"below": 1.0, "share": 0.1}, "give below .* or share"),
        ("loss_threshold", {"below": "much"}, "below must be a number, got 'much'"),
        ("loss_threshold", {"below": -1}, "from 0 on"),
        ("loss_threshold", {"share": 1.0}, "below 1"),
        ("loss_threshold", {"above": 1.0}, "unexpected keyword argument 'above'"),
        ("rho1", {"share": 0}, "above 0"),
    ],
)
def test_wrong_options_are_one_line(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_selector(kind, options)
    assert "\n" not in str(caught.value)
