"""Draws docs/images/pipeline.svg: what each process of a pipeline does when, under three schedules.

    python docs/draw_pipeline.py        (needs matplotlib)

The orders are megatron-core's own (its schedule table and number of warm-up micro-batches); when each piece runs
follows from what it waits for. A forward pass of all layers of a process takes one unit, its backward pass two; sending
is free.
"""

from collections.abc import Iterator
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from draw import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, save, text
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from parallel import engine  # noqa: F401  (makes the device ready before megatron-core is imported)

# isort: split
from megatron.core.pipeline_parallel.schedules import get_schedule_table

STAGES, MICRO_BATCHES = 4, 8
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


class Piece(NamedTuple):
    """One micro-batch's way through one model chunk, forward or backward."""

    forward: bool
    micro_batch: int
    chunk: int


def order(rank: int, chunks: int, group: int) -> Iterator[Piece]:
    """What process `rank` does, in megatron-core's order; `group` micro-batches go through a chunk before the next."""
    table = get_schedule_table(MICRO_BATCHES, chunks, group)
    forward = [Piece(True, micro_batch, chunk) for micro_batch, chunk in table]
    backward = [Piece(False, micro_batch, chunks - 1 - chunk) for micro_batch, chunk in table]
    warm_up = STAGES - rank - 1 if chunks == 1 else 2 * (STAGES - rank - 1) + (chunks - 1) * group
    warm_up = min(warm_up, len(table))
    yield from forward[:warm_up]
    for at in range(len(table) - warm_up):
        yield forward[warm_up + at]
        yield backward[at]
    yield from backward[len(table) - warm_up :]


def times(chunks: int, group: int) -> list[list[tuple[Piece, float, float]]]:
    """(piece, begin, end) of every process, each piece as soon as its process is free and its input is there."""
    waiting = [list(order(rank, chunks, group)) for rank in range(STAGES)]
    done: dict[tuple[bool, int, int], float] = {}
    free = [0.0] * STAGES
    found: list[list[tuple[Piece, float, float]]] = [[] for _ in range(STAGES)]
    while any(waiting):
        before = len(done)
        for rank in range(STAGES):
            while waiting[rank]:
                piece = waiting[rank][0]
                place = piece.chunk * STAGES + rank
                last = chunks * STAGES - 1
                if piece.forward:
                    needs = (True, piece.micro_batch, place - 1) if place else None
                else:
                    needs = (False, piece.micro_batch, place + 1) if place < last else (True, piece.micro_batch, last)
                if needs is not None and needs not in done:
                    break
                begin = max(free[rank], done[needs] if needs else 0.0)
                end = begin + (1.0 if piece.forward else 2.0) / chunks
                free[rank] = done[piece.forward, piece.micro_batch, place] = end
                found[rank].append((piece, begin, end))
                waiting[rank].pop(0)
        assert len(done) > before, "the order waits for itself"
    return found


def draw(axes: Axes, top: float, title: str, chunks: int, group: int, scale: float) -> None:
    """One schedule, its title above it."""
    found = times(chunks, group)
    end = max(piece[2] for rank in found for piece in rank)
    idle = 1.0 - sum(e - b for rank in found for _, b, e in rank) / (end * STAGES)
    text(axes, 1, top - 2, f"{title}: {idle:.0%} idle", size=9, bold=True, at="left")
    for rank, pieces in enumerate(found):
        text(axes, 1, top + 3 * rank + 1.5, f"process {rank}", size=7, colour=MUTED, at="left")
        for piece, begin, stop in pieces:
            colour = COLOURS[piece.chunk]
            box = Rectangle(
                (9 + begin * scale, top + 3 * rank),
                (stop - begin) * scale,
                2.7,
                facecolor=colour if piece.forward else "white",
                edgecolor="white" if piece.forward else colour,
                linewidth=0.8,
            )
            axes.add_patch(box)
            x = 9 + (begin + stop) / 2 * scale
            text(axes, x, top + 3 * rank + 1.35, str(piece.micro_batch), 5.5, "white" if piece.forward else INK)


def main() -> None:
    figure = plt.figure(figsize=(9.6, 6.0), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 96)
    axes.set_ylim(60, 0)
    axes.axis("off")
    longest = max(end for rank in times(1, MICRO_BATCHES) for _, _, end in rank)
    scale = 86 / longest
    draw(axes, 5, "1F1B", 1, STAGES, scale)
    draw(axes, 23, "depth-first: 2 chunks a process, 4 micro-batches through one before the next", 2, STAGES, scale)
    draw(axes, 41, "breadth-first: all 8 micro-batches through a chunk before the next", 2, MICRO_BATCHES, scale)
    words = "filled: forward, outlined: backward; numbers: micro-batches; blue and orange: a process's two chunks"
    text(axes, 1, 56, words, 7, MUTED, at="left")
    save(figure, "pipeline")


if __name__ == "__main__":
    main()
