"""What is trained on among the documents of a batch: scored by a forward pass, chosen, packed again, trained.

    micro-batches ──► losses of every token ──► selector ──► chosen tokens ──► fewer micro-batches ──► train_step
                      score.py                  `TokenSelector`               repack.py                pretrain.step

A worked example, `loss_threshold` with `below: 2.0`, two micro-batches of one row with 8 tokens:

    documents     A A A A A B B B    C C D D D D D D      mean losses A 1.2, B 2.9, C 2.2, D 0.4
    kept          B and C                                 in one micro-batch: B B B C C . . .

Backward runs over one micro-batch instead of two, and the loss is divided by the tokens of B and C. Reported losses
stay those of all four documents, so a mixing policy hears of everything that was drawn; what is drawn next never
depends on what was chosen. Nothing is remembered from step to step, so a killed run goes on bit for bit.

A selector of your own is a class with the two members of `TokenSelector`, named in the entry-point group
`headrace.selectors`. It must decide by what it is given alone, since every rank of a model asks its own.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from headrace.errors import ConfigError

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

BUILT_IN = {
    "loss_threshold": "pretrain.selection.loss_threshold:LossThreshold",
    "rho1": "pretrain.selection.rho1:Rho1",
}


@dataclass(frozen=True)
class Scored:
    """One data-parallel rank's part of a batch. All arrays are per token that carries loss, n of them."""

    step: int
    losses: Float64
    """float64[n]: the model's loss, nats, in whole multiples of 2⁻²⁰."""
    reference: Float64 | None
    """float64[n]: the reference model's loss of the same token; None without one."""
    documents: Int64
    """int64[n]: which piece of a document the token is in, numbered from 0 on this rank, ascending."""
    sources: Int64
    """int64[n]: number of the token's source."""

    def document_means(self) -> tuple[Float64, Int64]:
        """(mean loss of every document, the place of each token's document in it): float64[d], int64[n]."""
        _, places, counts = np.unique(self.documents, return_inverse=True, return_counts=True)
        sums = np.bincount(places, self.losses, minlength=len(counts))
        return sums / counts, places


Top = Callable[[Float64, float], BoolArray]
"""top(values float64[k], share): True for the `share` of all data-parallel ranks' values that are largest,
ceil(share · N) of N, and for those equal to the last of them; values are compared in whole multiples of 2⁻²⁰. Every
rank must call it."""


class TokenSelector(Protocol):
    """Chooses the tokens whose loss is minimised."""

    needs_reference: bool
    """Whether `Scored.reference` must be there."""

    def select(self, scored: Scored, top: Top) -> BoolArray:
        """bool[n]: the chosen tokens. A document without any is left out of the backward pass; of the others the rest
        is context. Must not depend on how documents are spread over ranks."""
        ...


def make_selector(kind: str, options: dict[str, Any]) -> TokenSelector:
    """The selector named `kind`. Raises ConfigError for an unknown name or options that it does not take."""
    offered: dict[str, set[str]] = {name: {value} for name, value in BUILT_IN.items()}
    for entry in entry_points(group="headrace.selectors"):
        offered.setdefault(entry.name, set()).add(entry.value)
    if kind not in offered:
        raise ConfigError(f"train.selection.kind: no selector {kind!r} (known: {', '.join(sorted(offered))})")
    if len(offered[kind]) > 1:
        names = ", ".join(sorted(offered[kind]))
        raise ConfigError(f"train.selection.kind: {kind!r} is the name of more than one selector ({names})")
    module, _, name = next(iter(offered[kind])).partition(":")
    try:
        return cast(TokenSelector, getattr(importlib.import_module(module), name)(**options))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"train.selection.kind: selector {kind!r} cannot be loaded: {error}") from None
    except TypeError as error:
        raise ConfigError(f"train.selection.options of {kind!r}: {str(error).split('__init__() ')[-1]}") from None
    except ValueError as error:
        raise ConfigError(f"train.selection.options of {kind!r}: {error}") from None
