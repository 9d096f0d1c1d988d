"""Sums by layer that hooks add to while a step runs: nothing is read back from the device before the step is over."""

import math
from collections import defaultdict
from typing import Final

import torch

from parallel import accelerator, process_groups

SUMS: Final = (
    "query_norm", "key_norm", "block_output", "output_logit", "weight", "gradient", "update", "mlp_gradient",
    "matrix_gradient", "noise", "micro_batches",
)  # fmt: skip
"""What is summed. A mean is the sum over the number of its terms, both over all ranks: what several ranks hold alike
counts as often in both."""
EDGES: Final = ("embedding", "final_norm", "output")
"""Parts of a model besides its blocks, which are called 0, 1, …"""


class Totals:
    """Sums, numbers of terms, and maxima, by kind and part of the model."""

    def __init__(self, layers: int) -> None:
        self.parts = [*map(str, range(layers)), *EDGES]
        """Names of the parts; a layer's place is its number."""
        self._sums: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        self._numbers: dict[tuple[str, int], float] = defaultdict(float)
        self._largest: dict[int, list[torch.Tensor]] = defaultdict(list)

    def place(self, part: str) -> int:
        """Place of one of EDGES."""
        return self.parts.index(part)

    def add(self, kind: str, place: int, total: torch.Tensor, number: float) -> None:
        """Add `number` terms whose sum is the scalar `total`."""
        self._sums[kind, place].append(total)
        self._numbers[kind, place] += number

    def count(self, kind: str, number: float) -> None:
        """Add `number` terms whose sum is told elsewhere, or not at all."""
        self._numbers[kind, 0] += number

    def add_largest(self, place: int, largest: torch.Tensor) -> None:
        """One more scalar that a part's maximum is over."""
        self._largest[place].append(largest)

    def reduce(self) -> "Reduced":
        """The totals over all ranks; the one place where a measured step waits for the device and for others."""
        size = len(self.parts)
        table = torch.zeros(2, len(SUMS) * size, dtype=torch.float64)
        row = {kind: number * size for number, kind in enumerate(SUMS)}
        for (kind, place), number in self._numbers.items():
            table[1, row[kind] + place] = number
        table = table.to(accelerator.device())
        if self._sums:
            values = [total for totals in self._sums.values() for total in totals]
            places = [row[kind] + place for (kind, place), totals in self._sums.items() for _ in totals]
            table[0].index_add_(0, torch.tensor(places, device=table.device), torch.stack(values).double())
        largest = torch.full((size,), -math.inf, device=table.device)
        for place, found in self._largest.items():
            largest[place] = torch.stack(found).amax()
        process_groups.sum_over_all(table)
        process_groups.largest_over_all(largest)
        return Reduced(self.parts, table.view(2, len(SUMS), size).tolist(), largest.tolist())


class Reduced:
    """Totals over all ranks, as plain numbers."""

    def __init__(self, parts: list[str], table: list[list[list[float]]], largest: list[float]) -> None:
        self.parts, self._largest = parts, largest
        self._sums, self._numbers = (dict(zip(SUMS, half, strict=True)) for half in table)

    def total(self, kind: str) -> float:
        """The sum over all parts."""
        return sum(self._sums[kind])

    def number(self, kind: str) -> float:
        """Terms of that sum."""
        return sum(self._numbers[kind])

    def means(self, kind: str) -> dict[str, float]:
        """The mean of every part that has terms."""
        each = zip(self.parts, self._sums[kind], self._numbers[kind], strict=True)
        return {part: total / number for part, total, number in each if number}

    def root_means(self, kind: str) -> dict[str, float]:
        """The same of what is a sum of squares, its root taken."""
        return {part: math.sqrt(mean) for part, mean in self.means(kind).items()}

    def largest(self) -> dict[str, float]:
        """The maximum of every part that has one."""
        return {part: value for part, value in zip(self.parts, self._largest, strict=True) if value > -math.inf}
