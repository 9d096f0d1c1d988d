"""Which checkpoints stay: the newest, every so many steps one for good, and no more bytes than allowed.

    doomed([100, 200, 300, 400], keep_last=1, keep_every=200)  ->  [100, 300]

A checkpoint stays when it is one of the `keep_last` newest, or its step is a multiple of `keep_every`. When what stays
is over `max_total_gb`, the oldest go until it is not; the newest stays whatever it weighs. A checkpoint that people
converted into the folder counts like any other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

GB = 10**9


def doomed(
    steps: Sequence[int],
    keep_last: int,
    keep_every: int = 0,
    max_total_gb: float = 0.0,
    sizes: Mapping[int, int] | None = None,
) -> list[int]:
    """Steps of the checkpoints that go, oldest first.

    `steps` ascending; `keep_last` 0 keeps all, `keep_every` 0 and `max_total_gb` 0 ask for nothing; `sizes` in bytes.
    """
    newest = set(steps[-keep_last:] if keep_last else steps)
    staying = [step for step in steps if step in newest or (keep_every and step % keep_every == 0)]
    sizes = sizes or {}
    while max_total_gb and len(staying) > 1 and sum(sizes.get(step, 0) for step in staying) > max_total_gb * GB:
        staying.pop(0)
    return [step for step in steps if step not in staying]


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
