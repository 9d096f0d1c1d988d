"""Which objective a document gets: drawn by weight, from its name alone.

Of a document, not of a sequence: a document is what attention sees, what packing lays out whole where it can, and what
`headrace data trace` names. A sequence changes with `seq_len` and packing, and what corruption adds to one would have
to be cut from it again after its tokens were counted.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from data_scheduler.encoder import Encoder
from data_scheduler.objectives.config import (
    CausalObjective,
    FimObjective,
    Objective,
    PrefixLmObjective,
    drawn_from,
)
from data_scheduler.objectives.prefix_lm import PrefixLm
from data_scheduler.objectives.span_corruption import SpanCorruption
from data_scheduler.order import draws
from data_scheduler.transforms.chance import is_drawn
from data_scheduler.transforms.config import FimTransform
from data_scheduler.transforms.fim import Sentinels, find_sentinels


class Fim(NamedTuple):
    """Fill in the middle with the tokenizer's ids."""

    config: FimTransform
    sentinels: Sentinels


Prepared = SpanCorruption | PrefixLm | Fim | None
"""What is done to a document; None: nothing, it stays causal."""


class Objectives:
    """The objectives of one source, ready to be drawn."""

    def __init__(self, objectives: Sequence[Objective], encoder: Encoder, source: str) -> None:
        """Raises ConfigError for tokens that the tokenizer lacks."""
        each = drawn_from(objectives)
        ends = list(itertools.accumulate(one.weight for one in each))
        self._ends = [end / ends[-1] for end in ends]
        """Where each one's share of [0, 1) ends."""
        self._prepared: list[Prepared] = []
        for one in each:
            if isinstance(one, CausalObjective):
                self._prepared.append(None)
            elif isinstance(one, FimObjective):
                fim = one.transform
                self._prepared.append(Fim(fim, find_sentinels(fim, encoder, source)))
            elif isinstance(one, PrefixLmObjective):
                self._prepared.append(PrefixLm(one, encoder, source))
            else:
                self._prepared.append(SpanCorruption(one, encoder, source))

    def draw(self, *key: int | str) -> Prepared:
        """The objective of the document that `key` names."""
        if len(self._prepared) == 1:
            return self._prepared[0]
        draw = draws(1, *key)[0]
        return self._prepared[next(place for place, end in enumerate(self._ends) if is_drawn(draw, end))]
