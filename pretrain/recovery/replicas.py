"""Do ranks that should hold the same weights hold the same?

A flipped bit in one rank's memory, a faulty adder, a collective that lost a message: each makes replicas drift apart,
silently, until the checkpoint of one of them is the run. Every `recovery.replicas_every` steps each rank makes one
64-bit number of its weights (`fingerprint`), and ranks that differ by their data-parallel place alone compare theirs.

The number is a sum over all 32- or 16-bit words of the weights, each times an odd number that depends on its place, in
wrapping integer arithmetic: one pass over memory, on the device, no order of addition, and a change of any single word
always changes it (an odd factor has an inverse modulo 2^64).
"""

from collections.abc import Iterable

import torch

from headrace.errors import ExitCode, HeadraceError
from parallel import accelerator, process_groups

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 1 << 22
"""Words at a time; their 64-bit copies take 32 MB each."""
GOLDEN = -7046029254386353131
"""2^64 over the golden ratio, as a signed number; odd. Multiples of it are spread evenly (Knuth, volume 3, 6.4)."""


class ReplicasDiffer(HeadraceError):
    """Ranks that should hold the same weights do not; the last checkpoint is better than what they hold."""

    exit_code = ExitCode.RECOVERABLE


@torch.no_grad()
def fingerprint(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One int64 on the device that stands for all bits of `tensors` and their order."""
    total = torch.zeros((), dtype=torch.int64, device=accelerator.device())
    place = 1
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
        for start in range(0, words.numel(), PIECE):
            piece = words[start : start + PIECE].to(torch.int64)
            places = torch.arange(place, place + piece.numel(), dtype=torch.int64, device=piece.device)
            total += (piece * (places * GOLDEN | 1)).sum()
            place += piece.numel()
    return total


def check_replicas(tensors: Iterable[torch.Tensor], step: int, rank: int) -> None:
    """Raises ReplicasDiffer on every data-parallel rank when one's weights differ from the others'."""
    found = process_groups.gather_over_replicas(fingerprint(tensors))
    values = list(found.values())
    common = max(values, key=values.count)
    ranks = [each for each, value in found.items() if value != common]
    if ranks and 2 * values.count(common) <= len(values):
        raise ReplicasDiffer(
            f"after step {step} ranks {', '.join(map(str, found))} hold different weights, and it cannot be told which "
            "are right: memory or arithmetic of a machine is at fault; find it, then start from the last checkpoint"
        )
    if ranks:
        of = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        others = len(values) - len(ranks)
        raise ReplicasDiffer(
            f"after step {step} the weights of {of} are not those of the other {others} replicas: memory or arithmetic "
            "of that machine is at fault; start again without it, from the last checkpoint"
        )
