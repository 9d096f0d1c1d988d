"""What an update does: RMS of weights, of gradients before clipping, and of the change, by layer.

The optimizer's own fp32 weights are looked at, with the gradients it is about to use: reduced over ranks and divided by
the tokens of the global batch. Under the distributed optimizer a rank holds a range of each, and adds up that.

Where our kernel updates the weights (`kernels.adamw`) it adds up all three in its one pass. Elsewhere each is a pass of
its own, with a copy of the weights from before.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from parallel.adam import GroupStepAdam
from parallel.fused_adamw import fused_adams
from parallel.parameter_names import BLOCKS, OUTPUT_HEAD, parameter_names
from pretrain.dynamics.noise_scale import is_measured
from pretrain.dynamics.totals import Totals
from pretrain.master_weights import master_weights


class _Part(NamedTuple):
    weight: torch.Tensor
    """fp32, and `.grad`: a whole parameter or this rank's range of it."""
    place: int
    name: str


class Weights:
    """Compares the weights before and after an update.

    By a copy, 4 bytes for each weight that this rank's optimizer holds, which lives during the update alone, when no
    activation does; our kernel needs none.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any, tp_rank: int, totals: Totals) -> None:
        self._totals, self._adams = totals, fused_adams(optimizer)
        places = dict(_places(chunks, totals))
        self._parts = [
            _Part(weight, *places[parameter])
            for parameter, weight in master_weights(optimizer)
            if parameter in places and _counts_here(parameter, tp_rank)
        ]
        self._before: list[torch.Tensor] = []

    @torch.no_grad()
    def before_update(self) -> None:
        """Once gradients are ready, not clipped yet."""
        if self._adams is not None:
            for each in self._adams:
                each.keep_sums()
            return
        self._before = [part.weight.detach().clone() for part in self._parts]
        self._add_what_was()

    @torch.no_grad()
    def after_update(self) -> None:
        """Once the weights have changed."""
        if self._adams is not None:
            self._add_sums(self._adams)
            return
        if self._parts:
            torch._foreach_sub_(self._before, [part.weight.detach() for part in self._parts])
        self._add("update", self._parts, self._before)
        self._before = []

    @torch.no_grad()
    def after_no_update(self) -> None:
        """Instead of `after_update`, where the update was skipped: of that there is nothing to tell."""
        if self._adams is not None:
            for each in self._adams:
                each.keep_sums(False)
            self._add_what_was()
        self._before = []

    def _add_what_was(self) -> None:
        """Weights and gradients, before an update."""
        self._add("weight", self._parts, [part.weight.detach() for part in self._parts])
        graded = [part for part in self._parts if part.weight.grad is not None]
        for part, norm in zip(graded, _norms([part.weight.grad for part in graded]), strict=True):
            self._add_gradient(part, norm.double().square())

    def _add_gradient(self, part: _Part, square: torch.Tensor) -> None:
        number = part.weight.numel()
        self._totals.add("gradient", part.place, square, number)
        if part.name.endswith("mlp.linear_fc1.weight"):
            self._totals.add("mlp_gradient", part.place, square, number)
        if is_measured(part.name):
            self._totals.add("matrix_gradient", part.place, square, number)

    def _add_sums(self, adams: Sequence[GroupStepAdam]) -> None:
        """What the optimizers added up while they made their updates."""
        found = dict(chain.from_iterable(each.sums.items() for each in adams))
        for part in self._parts:
            if part.weight in found:
                gradient, update, weight = found[part.weight].unbind()
                self._add_gradient(part, gradient)
                self._totals.add("update", part.place, update, part.weight.numel())
                self._totals.add("weight", part.place, weight, part.weight.numel())
        still = [part for part in self._parts if part.weight not in found]
        self._add("weight", still, [part.weight.detach() for part in still])
        self._add("update", still, [torch.zeros_like(part.weight[:0]) for part in still])

    def _add(self, kind: str, parts: list[_Part], tensors: list[torch.Tensor]) -> None:
        for part, norm in zip(parts, _norms(tensors), strict=True):
            self._totals.add(kind, part.place, norm.double().square(), part.weight.numel())


def _norms(tensors: list[Any]) -> tuple[torch.Tensor, ...]:
    return torch._foreach_norm(tensors) if tensors else ()  # one kernel for hundreds of tensors


def _places(chunks: Sequence[Any], totals: Totals) -> Iterator[tuple[Any, tuple[int, str]]]:
    """Each parameter's (place in the totals, name)."""
    edges = {"embedding.": "embedding", "decoder.final_layernorm.": "final_norm", OUTPUT_HEAD: "output"}
    for parameter, name in parameter_names(chunks).items():
        if name.startswith(BLOCKS):
            yield parameter, (int(name.removeprefix(BLOCKS).split(".")[0]), name)
        for prefix, part in edges.items():
            if name.startswith(prefix):
                yield parameter, (totals.place(part), name)


def _counts_here(parameter: Any, tp_rank: int) -> bool:
    """Whether a parameter is this rank's to count: of what tensor-parallel ranks all hold only the first one's, and of
    tied embeddings not the copy that the last pipeline stage has."""
    return (getattr(parameter, "tensor_model_parallel", False) or tp_rank == 0) and not getattr(
        parameter, "shared", False
    )
