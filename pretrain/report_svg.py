"""A line chart as SVG text, for pages without scripts.

    Chart("Loss", "nats per token", steps, [Line("code", losses, colour=0)]).figure()     # "<figure>…</figure>"

Lines are drawn as in the PNG of `headrace report`: the smoothed one, and behind it, pale, the values themselves.
Colours are CSS variables (`--c0` to `--c5`, `--ink`) that the page sets.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pretrain.report import WINDOWS, Floats, smooth, thin

HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 28
POINTS = 600
"""Points of a line at most: about one a pixel."""
COLOURS, DASHES = 6, ("", "7 3", "2 3")
Colour = int | Literal["ink"]


@dataclass(frozen=True)
class Line:
    """One value a step, NaN where there is none."""

    name: str
    values: Floats
    colour: Colour
    style: Literal["both", "values", "trend"] = "both"
    """What is drawn: the smoothed values and behind them the values, or one of them."""


@dataclass(frozen=True)
class Points:
    """Single values, (step, value)."""

    name: str
    values: Sequence[tuple[float, float]]
    colour: Colour


@dataclass(frozen=True)
class Chart:
    """Lines over steps."""

    title: str
    unit: str
    steps: Floats
    lines: Sequence[Line]
    points: Sequence[Points] = ()
    marks: Sequence[tuple[float, str]] = field(default=())
    """(step, word) of vertical lines."""
    width: int = 640
    """Of the drawing; the page makes it as wide as its place, and the text with it."""

    def figure(self) -> str:
        """The chart with its title and legend as HTML."""
        unit = f" <small>{_text(self.unit)}</small>" if self.unit else ""
        legend = "".join(f"<li>{_sample(line.colour)}{_text(line.name)}</li>" for line in self.lines)
        below = f'<ul class="legend">{legend}</ul>' if len(self.lines) > 1 else ""
        return f"<figure><figcaption>{_text(self.title)}{unit}</figcaption>{self.svg()}{below}</figure>"

    def svg(self) -> str:
        """The drawing alone."""
        drawn = [(line, *_finite(self.steps, line.values)) for line in self.lines]
        drawn = [(line, x, y) for line, x, y in drawn if len(x)]
        dots = [(of, [(x, y) for x, y in of.values if math.isfinite(y)]) for of in self.points]
        head = f'<svg viewBox="0 0 {self.width} {HEIGHT}" role="img" aria-label="{_text(self.title)}">'
        if not drawn and not any(found for _, found in dots):
            return (
                f'{head}<text x="{self.width / 2}" y="{HEIGHT / 2}" text-anchor="middle">no finite value</text></svg>'
            )
        smoothed = [y if line.style == "values" else smooth(y, len(y) // (2 * WINDOWS)) for line, _, y in drawn]
        # One wild value must not flatten all the others: what lies outside is drawn along the frame.
        inner = [
            even if line.style != "both" else np.append(np.quantile(y, (0.005, 0.995)), y[0])
            for (line, _, y), even in zip(drawn, smoothed, strict=True)
        ]
        reach = np.concatenate([*inner, [y for _, found in dots for _, y in found]])
        low, high = _widened(float(reach.min()), float(reach.max()))
        first, last = float(self.steps.min()), float(self.steps.max())
        last = max(last, first + 1.0)

        def place(x: Floats, y: Floats) -> str:
            across = LEFT + (x - first) / (last - first) * (self.width - LEFT - RIGHT)
            down = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
            return " ".join(
                f"{a:.1f},{np.clip(d, TOP, HEIGHT - BOTTOM):.1f}" for a, d in zip(across, down, strict=True)
            )

        parts = [head]
        for tick in ticks(low, high, 5):
            x, y = place(np.array([first]), np.array([tick])).split(",")
            parts.append(f'<path class="axis" d="M{x} {y}H{self.width - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{label(tick)}</text>')
        for tick in ticks(first, last, 8):
            x = place(np.array([tick]), np.array([low])).split(",")[0]
            parts.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{label(tick)}</text>')
        for step, word in self.marks:
            if first <= step <= last:
                x = place(np.array([step]), np.array([low])).split(",")[0]
                title = f"<title>{_text(word)} at step {step}</title>"
                parts.append(f'<path class="mark" d="M{x} {TOP}V{HEIGHT - BOTTOM}">{title}</path>')
        for (line, x, y), even in zip(drawn, smoothed, strict=True):
            style = _stroke(line.colour)
            if line.style == "both":
                parts.append(f'<polyline class="raw" style="{style}" points="{place(x, y)}"/>')
            title = f"<title>{_text(line.name)}</title>"
            parts.append(f'<polyline class="line" style="{style}" points="{place(x, even)}">{title}</polyline>')
        for of, found in dots:
            for at, value in found:
                x, y = place(np.array([float(at)]), np.array([value])).split(",")
                title = f"<title>{_text(of.name)}, step {at}: {value:.4f}</title>"
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:{_variable(of.colour)}">{title}</circle>')
        for at in self._broken():
            x = place(np.array([at]), np.array([low])).split(",")[0]
            title = f"<title>not finite at step {at:.0f}</title>"
            parts.append(f'<text class="bad" x="{x}" y="{TOP + 8}" text-anchor="middle">✕{title}</text>')
        return "".join(parts) + "</svg>"

    def _broken(self) -> list[float]:
        """Steps whose total is not finite, 50 at most; other lines have gaps where a step had none of a source."""
        totals = [line for line in self.lines if line.colour == "ink"]
        return [float(step) for line in totals for step in self.steps[~np.isfinite(line.values)][:50]]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, `most` at most."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10, 20) if factor * unit >= raw * (1 - 1e-9))
    start = math.ceil(low / step - 1e-9)
    return [number * step for number in range(start, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick's number: 0.0003, 1.5, 20k."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, with some room."""
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _finite(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    keep = np.isfinite(values)
    if not keep.any():
        return steps[keep], values[keep]
    return thin(steps[keep], POINTS), thin(values[keep], POINTS)


def _variable(colour: Colour) -> str:
    return "var(--ink)" if colour == "ink" else f"var(--c{colour % COLOURS})"


def _stroke(colour: Colour) -> str:
    dash = "" if colour == "ink" else DASHES[colour // COLOURS % len(DASHES)]
    return f"stroke:{_variable(colour)}" + (f";stroke-dasharray:{dash}" if dash else "")


def _sample(colour: Colour) -> str:
    return f'<svg viewBox="0 0 24 10"><path class="line" style="{_stroke(colour)}" d="M0 5H24"/></svg>'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
