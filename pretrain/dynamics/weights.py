"""What an update does: RMS of weights, of gradients before clipping, and of the change, by layer.

The optimizer's own fp32 weights are looked at, with the gradients it is about to use: reduced over ranks and divided by
the tokens of the global batch. Under the distributed optimizer a rank holds a range of each, and adds up that.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

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
    """Takes a copy of the weights before an update and compares after it.

    The copy, 4 bytes for each weight that this rank's optimizer holds, lives during the update alone, when no
    activation does.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any, tp_rank: int, totals: Totals) -> None:
        self._totals = totals
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
        self._before = [part.weight.detach().clone() for part in self._parts]
        self._add("weight", self._before)
        graded = [part for part in self._parts if part.weight.grad is not None]
        gradients = [part.weight.grad for part in graded]
        for part, norm in zip(graded, _norms(gradients), strict=True):
            square, number = norm.double().square(), part.weight.numel()
            self._totals.add("gradient", part.place, square, number)
            if part.name.endswith("mlp.linear_fc1.weight"):
                self._totals.add("mlp_gradient", part.place, square, number)
            if is_measured(part.name):
                self._totals.add("matrix_gradient", part.place, square, number)

    @torch.no_grad()
    def after_update(self) -> None:
        """Once the weights have changed; never, where the update was skipped."""
        if self._parts:
            torch._foreach_sub_(self._before, [part.weight.detach() for part in self._parts])
        self._add("update", self._before)
        self._before = []

    def _add(self, kind: str, tensors: list[torch.Tensor]) -> None:
        for part, norm in zip(self._parts, _norms(tensors), strict=True):
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
