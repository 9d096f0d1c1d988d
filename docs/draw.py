"""Draws the pictures of the documentation: `python docs/draw.py` writes docs/images/*.svg (needs matplotlib).

`python docs/draw.py runs/quickstart` draws that run's losses to docs/images/quickstart.png instead.

The picture of the lanes is computed by the scheduler's own functions, so what it shows is what a run does.
"""

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from data_scheduler.mixture import Mixer, quantize, slots
from data_scheduler.order import deal, permutation

IMAGES = Path(__file__).parent / "images"
INK, MUTED, PAPER, LINE = "#1f2933", "#5f6b7a", "#f5f7fa", "#9aa5b1"
# Okabe and Ito's colours: told apart with any kind of colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A white figure whose coordinates are tenths of an inch."""
    figure = plt.figure(figsize=(width / 10, height / 10), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, w: float, h: float, fill: str = PAPER, edge: str = LINE, width: float = 1.2
) -> None:
    """A rounded box with its top left corner at (x, y)."""
    style = "round,pad=0,rounding_size=0.9"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=width))


def text(
    axes: Axes,
    x: float,
    y: float,
    words: str,
    size: float = 9,
    colour: str = INK,
    bold: bool = False,
    at: str = "center",
) -> None:
    """Words centred on (x, y), or beginning there with at="left"."""
    weight = "bold" if bold else "normal"
    axes.text(
        x,
        y,
        words,
        fontsize=size,
        color=colour,
        fontweight=weight,
        ha=at,
        va="center_baseline" if "\n" not in words else "center",
        linespacing=1.35,
    )


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, colour: str = MUTED
) -> None:
    """An arrow from `start` to `end`; `bend` curves it."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.4)
    )


def corner(axes: Axes, points: list[tuple[float, float]], colour: str = MUTED) -> None:
    """A line through `points` that ends in an arrow."""
    for start, end in itertools.pairwise(points[:-1]):
        axes.plot((start[0], end[0]), (start[1], end[1]), color=colour, lw=1.4, solid_capstyle="round")
    arrow(axes, points[-2], points[-1], colour=colour)


def save(figure: plt.Figure, name: str) -> None:
    """Write docs/images/`name`.svg, the same bytes for the same matplotlib."""
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    if "--png" in sys.argv:  # to look at
        figure.savefig(f"{sys.argv[sys.argv.index('--png') + 1]}/{name}.png", dpi=100)
    plt.close(figure)


def data_flow() -> None:
    """From raw documents to a model: the picture of the README."""
    figure, axes = canvas(112, 50)
    text(axes, 10, 11.2, "raw documents", 10, bold=True)
    for row, (name, colour) in enumerate(
        (("code  .jsonl.zst", BLUE), ("prose  .jsonl.gz", ORANGE), ("maths  .parquet", GREEN))
    ):
        box(axes, 1.5, 13.5 + 5.2 * row, 17, 4.2, "white", colour, 1.8)
        text(axes, 10, 15.6 + 5.2 * row, name, 8.5)
    arrow(axes, (19.2, 20.9), (23.6, 20.9))

    box(axes, 24, 9, 31, 22)
    text(axes, 39.5, 11.2, "data_scheduler: what comes next", 10, bold=True)
    for number, (name, what) in enumerate(
        (
            ("chunks", "cut once, written to the journal"),
            ("lanes", "dealt by seed, each epoch"),
            ("documents", "shuffled inside their chunk"),
            ("tokens", "encoded while the model trains"),
            ("sequences", "packed full, one source each"),
        )
    ):
        y = 14.9 + 3.4 * number
        text(axes, 26, y, name, 8.5, bold=True, at="left")
        text(axes, 34.4, y, what, 8.5, MUTED, at="left")
    arrow(axes, (55.4, 20.9), (59.6, 20.9))

    text(axes, 64.5, 11.2, "global batch", 10, bold=True)
    pattern = [BLUE, GREEN, BLUE, ORANGE, BLUE, ORANGE, BLUE, GREEN, ORANGE, BLUE, ORANGE, BLUE]
    for slot, colour in enumerate(pattern):
        x, y = 60.2 + 4.4 * (slot % 2), 13.5 + 2.6 * (slot // 2)
        axes.add_patch(Rectangle((x, y), 4.1, 2.2, facecolor=colour, edgecolor="none", alpha=0.85))
    text(axes, 64.5, 30.4, "the same for every\nnumber of processes", 7.5, MUTED)
    arrow(axes, (69.2, 20.9), (73.6, 20.9))

    box(axes, 74, 9, 19, 22)
    text(axes, 83.5, 11.2, "pretrain, parallel", 10, bold=True)
    text(axes, 83.5, 15.6, "megatron-core GPTModel", 8.5)
    text(axes, 83.5, 19.2, "data, tensor, sequence,\ncontext, pipeline parallel", 8.5, MUTED)
    text(axes, 83.5, 23.6, "attention stays inside\neach document", 8.5, MUTED)
    text(axes, 83.5, 28.2, "CPU + gloo or GPU + NCCL", 8.5, MUTED)
    arrow(axes, (93.4, 16.2), (97.2, 16.2))
    arrow(axes, (93.4, 25.6), (97.2, 25.6))
    text(axes, 97.9, 16.2, "checkpoints\n(Hugging Face)", 8.5, at="left")
    text(axes, 97.9, 25.6, "metrics.jsonl\n(wandb, TensorBoard,\nPrometheus)", 8.5, at="left")

    corner(axes, [(83.5, 8.8), (83.5, 3.8), (55.2, 3.8)], PURPLE)
    text(axes, 69.8, 2.2, "tokens and loss of every source, exact", 8.5, PURPLE)
    box(axes, 24, 1.5, 31, 4.6, "white", PURPLE, 1.6)
    text(axes, 39.5, 3.8, "policy: mixture weights of each step", 9)
    arrow(axes, (39.5, 6.3), (39.5, 8.8), colour=PURPLE)

    arrow(axes, (39.5, 31.3), (39.5, 37), colour=INK)
    text(axes, 40.6, 34, "each decision, before it takes effect", 8.5, MUTED, at="left")
    box(axes, 24, 37.4, 69, 4.6, INK, INK)
    text(axes, 58.5, 39.7, "journal.jsonl:  the data order is a pure function of this file", 9.5, "white", bold=True)
    for x, (name, what) in zip(
        (35.5, 58.5, 81.5),
        (
            ("replay", "any past batch again, bit for bit"),
            ("trace", "which documents a step held"),
            ("ledger", "what each source has given"),
        ),
        strict=True,
    ):
        arrow(axes, (x, 42.2), (x, 45))
        text(axes, x, 46.3, name, 9, bold=True)
        text(axes, x, 48.5, what, 8, MUTED)
    save(figure, "data_flow")


def architecture() -> None:
    """The packages and who imports whom."""
    figure, axes = canvas(84, 47)
    rooms = (
        ("launch", "how it gets there", "SLURM script, restarts, code snapshot", 24, 1.5, 36),
        ("pretrain", "what a run does", "config, models, step, loop, checkpoints, metrics, command line", 12, 13, 60),
        (
            "parallel",
            "where it runs",
            "device door, layout, process groups,\nattention; megatron-core behind one door",
            2,
            25,
            36,
        ),
        (
            "data_scheduler",
            "what comes next",
            "journal, lanes, mixing, packing;\nno torch.distributed, usable alone",
            46,
            25,
            36,
        ),
        ("headrace", "what all share", "version, errors, exit codes", 24, 38.5, 36),
    )
    for name, question, parts, x, y, width in rooms:
        height = 9 if "\n" in parts else 7.2
        box(axes, x, y, width, height)
        text(axes, x + width / 2 - 0.6, y + 2.1, f"{name}/", 10.5, bold=True)
        text(axes, x + width / 2, y + 4.0, question, 8.5, BLUE)
        text(axes, x + width / 2, y + (6.7 if "\n" in parts else 5.9), parts, 8, MUTED)
    arrow(axes, (42, 8.9), (42, 12.8), colour=INK)
    arrow(axes, (28, 20.4), (20, 24.8), colour=INK)
    arrow(axes, (56, 20.4), (64, 24.8), colour=INK)
    arrow(axes, (20, 34.2), (32, 38.3), colour=INK)
    arrow(axes, (64, 34.2), (52, 38.3), colour=INK)
    text(axes, 42, 29.4, "no\nimports", 8, "#B00020")
    text(axes, 61, 10.8, "an arrow means: imports", 8, MUTED, at="left")
    save(figure, "architecture")


def lanes() -> None:
    """Chunks dealt to lanes, and lanes filling the slots of three steps, on one rank and on two."""
    figure, axes = canvas(104, 58)
    lane_count, batch, colours = 4, 4, (BLUE, ORANGE)
    sizes = {"code": np.array([40, 30, 40, 30, 40, 20]), "prose": np.array([30, 40, 30, 40])}

    text(axes, 2, 2.6, "1  Chunks are permuted and dealt to lanes (epoch 0)", 10, bold=True, at="left")
    text(axes, 2, 5.4, "width = bytes, number = chunk in file order", 8, MUTED, at="left")
    hands = {
        name: deal(
            chunk_sizes,
            permutation(len(chunk_sizes), 0, "chunks", name, 0),
            permutation(lane_count, 0, "lanes", name, 0),
        )
        for name, chunk_sizes in sizes.items()
    }
    for lane in range(lane_count):
        y = 10 + 5 * lane
        text(axes, 2, y, f"lane {lane}", 9, at="left")
        for column, (name, colour) in enumerate(zip(sizes, colours, strict=True)):
            x = 9.5 + 20.5 * column
            for chunk in hands[name][lane]:
                width = sizes[name][chunk] / 5.2
                axes.add_patch(
                    Rectangle((x, y - 1.7), width - 0.4, 3.4, facecolor=colour, edgecolor="none", alpha=0.85)
                )
                text(axes, x + width / 2 - 0.2, y, str(chunk), 8.5, "white", bold=True)
                x += width
    for column, (name, colour) in enumerate(zip(sizes, colours, strict=True)):
        text(axes, 9.5 + 20.5 * column, 29.6, f"source {name}", 8.5, colour, bold=True, at="left")

    text(axes, 56, 2.6, "2  Weights become counts, counts become slots", 10, bold=True, at="left")
    text(axes, 56, 5.4, "code 0.7, prose 0.3, global batch 4", 8, MUTED, at="left")
    mixer, shares = Mixer(2), quantize({"code": 0.7, "prose": 0.3}, ["code", "prose"])
    for column, heading in enumerate(("slot 0\nlane 0", "slot 1\nlane 1", "slot 2\nlane 2", "slot 3\nlane 3")):
        text(axes, 66.2 + 6.4 * column, 9.2, heading, 8, MUTED)
    text(axes, 96.5, 9.2, "owed after\ncode, prose", 8, MUTED)
    drawn, asked = [], np.zeros((4, 2), dtype=np.int32)
    for step in range(4):
        counts = mixer.counts(shares, batch)
        sources = slots(counts, asked, np.arange(4), 0, step)
        drawn.append(sources)
        y = 13.6 + 4.4 * step
        text(axes, 56, y, f"step {step}", 9, at="left")
        for slot, source in enumerate(sources):
            rectangle = Rectangle((63.3 + 6.4 * slot, y - 1.6), 5.8, 3.2, facecolor=colours[source], alpha=0.85)
            axes.add_patch(rectangle)
            text(axes, 66.2 + 6.4 * slot, y, ("code", "prose")[source], 8, "white")
        owed = mixer.owed / 2**40
        text(axes, 96.5, y, f"{owed[0] + 0:+.1f}   {owed[1] + 0:+.1f}", 8.5)

    text(
        axes,
        2,
        35,
        "3  Ranks own lanes, so step 0 is the same global batch for any number of them",
        10,
        bold=True,
        at="left",
    )
    for block, (x, ranks) in enumerate(((2, 1), (36, 2), (70, 4))):
        text(axes, x, 39, f"data-parallel size {ranks}", 9, at="left")
        for rank in range(ranks):
            own = range(rank, batch, ranks)
            width = len(own) * 6.4 + 0.6
            left = x + rank * (30.4 / ranks)
            box(axes, left, 41, width, 9.5, PAPER, LINE)
            text(axes, left + width / 2, 43, f"rank {rank}", 8, MUTED)
            for place, slot in enumerate(own):
                source = drawn[0][slot]
                rectangle = Rectangle((left + 0.6 + 6.4 * place, 44.6), 5.8, 3.6, facecolor=colours[source], alpha=0.85)
                axes.add_patch(rectangle)
                text(axes, left + 3.5 + 6.4 * place, 46.4, f"slot {slot}", 8, "white")
        if block:
            text(axes, x - 2, 46, "=", 14, MUTED)
    text(axes, 52, 54.5, "Each rank reads only its own lanes' chunks. batch_sha256 is equal in all three.", 9, MUTED)
    save(figure, "lanes")


def quickstart(run: str) -> None:
    """The plot of `headrace report`, in 64 colours: 89 KB instead of 319."""
    from PIL import Image  # comes with matplotlib

    from pretrain.report import load_run, plot

    picture = IMAGES / "quickstart.png"
    plot(load_run(run), picture)
    with Image.open(picture) as full:
        full.convert("RGB").quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "headrace", "font.family": "DejaVu Sans"})
    IMAGES.mkdir(exist_ok=True)
    if len(sys.argv) == 2:
        quickstart(sys.argv[1])
    else:
        data_flow()
        architecture()
        lanes()
