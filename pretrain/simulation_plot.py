"""The picture of a simulated run: shares over steps above, epochs below.

Up to ten sources get a colour each and a legend. More, and a legend is no help: then colour goes by share, the axis of
shares is logarithmic, and the bars below, named one by one, are the legend.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from data_scheduler.simulate import MANY_EPOCHS, Simulation
from pretrain.picture import COLOURS, LINE_STYLES, picture

FEW = 10
"""Sources that a legend can hold and an eye can tell apart."""
WIDE = 30
"""Most epochs over the median from which bars on a linear axis would be flat."""
NAME_LENGTH = 24
"""Characters of a source's name that have room beside its bar."""


def plot_simulation(simulation: Simulation, path: str | Path) -> None:
    """Draw into the PNG `path`. Raises ConfigError without matplotlib, OSError when it cannot be written."""
    sources = simulation.sources
    many = len(sources) > FEW
    size = (11, 6.4) if not many else (max(11.0, 0.26 * len(sources)), 8.6)
    with picture(path, figsize=size, dpi=130) as figure:
        above, below = figure.subplots(2, height_ratios=(3, 2))
        order = sorted(range(len(sources)), key=lambda n: (-sources[n].share_realised, n))
        colours: list[Any] = [COLOURS[n % len(COLOURS)] for n in range(len(sources))]
        if many:
            from matplotlib import colormaps

            for rank, number in zip(np.linspace(0, 0.92, len(sources)), order, strict=True):
                colours[number] = colormaps["turbo"](0.04 + rank)
        _draw_shares(simulation, above, colours, many)
        _draw_epochs(simulation, below, colours, order if many else list(range(len(sources))), many)


def _draw_shares(simulation: Simulation, axes: Any, colours: list[Any], many: bool) -> None:
    for number, source in enumerate(simulation.sources):
        colour = colours[number]
        line = LINE_STYLES[0] if many else LINE_STYLES[number // len(COLOURS) * 2 % len(LINE_STYLES)]
        realised = np.where(simulation.realised[:, number] > 0, simulation.realised[:, number], math.nan)
        asked = np.where(simulation.asked[:, number] > 0, simulation.asked[:, number], math.nan)
        axes.step(simulation.at, asked, "--", where="post", color=colour, linewidth=1.0, alpha=0.4 if many else 0.75)
        # Thinner one after the other: of lines that lie on each other all are seen.
        width = 1.3 if many else 3.4 - 2.2 * number / FEW
        axes.plot(simulation.at, realised, line, color=colour, linewidth=width, label=source.source)
        if source.end is not None:
            at = min(int(simulation.at.searchsorted(source.end.through)), len(simulation.at) - 1)
            axes.plot(simulation.at[at], simulation.realised[at, number], "X", color=colour, markersize=8,
                      markeredgecolor="white", zorder=5)  # fmt: skip
    axes.set_title(
        f"{simulation.policy} mixture of {len(simulation.sources)} sources   "
        f"{simulation.steps:,} steps of {simulation.said_shape} tokens",
        loc="left", pad=10,
    )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("share of tokens so far")
    axes.margins(x=0.01)
    # The first steps' shares jump between few whole sequences; they may leave the picture.
    settled = simulation.realised[len(simulation.realised) // 50 :]
    most = max(float(simulation.asked.max()), float(settled.max()))
    if many:
        axes.set_yscale("log")
        drawn = [source.share_realised for source in simulation.sources if source.share_realised > 0]
        axes.set_ylim(min(drawn) / 2, min(1.0, 1.5 * most))
    else:
        axes.set_ylim(0, min(1.02, 1.12 * most))
    axes.plot([], [], "--", color="#555555", linewidth=1.0, label="asked in that step")
    if any(source.end for source in simulation.sources):
        axes.plot([], [], "X", color="#555555", markeredgecolor="white", markersize=8, label="source is through")
    handles, labels = axes.get_legend_handles_labels()
    own = len(simulation.sources) if many else 0
    axes.legend(handles[own:], labels[own:], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_epochs(simulation: Simulation, axes: Any, colours: list[Any], order: list[int], many: bool) -> None:
    sources = [simulation.sources[number] for number in order]
    places = np.arange(len(sources))
    epochs = [source.epochs or 0.0 for source in sources]
    errors = [source.epochs_error or 0.0 for source in sources]
    axes.bar(places, epochs, 0.7, color=[colours[number] for number in order], alpha=0.85)
    shown = np.array(errors) > 0.005 * max(*epochs, 0.01)
    if shown.any():
        axes.errorbar(
            places[shown], np.array(epochs)[shown], np.array(errors)[shown], fmt="none", ecolor="#333333", elinewidth=1,
            capsize=2, label="± two standard errors",
        )  # fmt: skip
    limited = [(place, source.max_epochs) for place, source in enumerate(sources) if source.max_epochs is not None]
    top = max(max(epoch + error for epoch, error in zip(epochs, errors, strict=True)), 0.01)
    if limited:
        # A limit far above all bars would make them flat; it is no limit of this run anyway.
        near = [(place, limit) for place, limit in limited if limit <= 2.5 * top]
        x, y = zip(*near, strict=True) if near else ((), ())
        axes.plot(x, y, "_", color="black", markersize=9 if many else 26, markeredgewidth=2.0, label="max_epochs")
        top = max(top, *(limit for _, limit in near), 0)
    if top > MANY_EPOCHS:
        axes.axhline(MANY_EPOCHS, color="#b00020", linewidth=1.0, linestyle=":", label=f"{MANY_EPOCHS} epochs")
    # The numbers stand with the names: above the bars they would run into the marks.
    names = [s.source if len(s.source) <= NAME_LENGTH else s.source[: NAME_LENGTH - 1] + "…" for s in sources]
    between = "  " if many else "\n"
    names = [name + between + _said(source.epochs) for name, source in zip(names, sources, strict=True)]
    axes.set_xticks(places, names, rotation=90 if many else 0, fontsize=7.5 if many else 9.5)
    axes.set_xlim(-0.6, len(sources) - 0.4)
    drawn = sorted(epoch for epoch in epochs if epoch > 0)
    if drawn and top > WIDE * drawn[len(drawn) // 2]:
        axes.set_yscale("log")
        axes.set_ylim(drawn[0] / 2, top * (top / drawn[0]) ** 0.25)
    else:
        axes.set_ylim(0, 1.2 * top)
    axes.set_ylabel("epochs (estimated)")
    axes.grid(axis="x", visible=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _said(epochs: float | None) -> str:
    return "?" if epochs is None else f"{epochs:.2f}" if epochs < 9.995 else f"{epochs:,.0f}"
