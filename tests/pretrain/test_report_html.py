"""The report as one HTML file: it draws what the records say, needs nothing else, and lets nothing hostile in."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import example, record, write
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.report import load_run
from pretrain.report_html import MOST_SOURCES, page
from pretrain.report_svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, Chart, Line, ticks

HOSTILE = "</title></td><script>alert('1')</script><img src=x onerror=\"alert(1)\">\x00\ud800"


class Seen(HTMLParser):
    """Tags, attributes and text of a page; open tags must be closed in order."""

    VOID = frozenset({"meta", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in self.VOID or (tag == "path" and ("class", "mark") in attributes):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
        elif tag not in ("circle",):
            raise AssertionError(f"</{tag}> closes {self._open[-1:]}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_file_says_all(tmp_path: Path) -> None:
    run = example(tmp_path / "run")
    out = tmp_path / "sent" / "report.html"
    done = CliRunner().invoke(app, ["report", str(run), "--html", str(out)])
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    text = out.read_text(encoding="utf-8")
    seen = Seen(text)
    for words in ("finished", "600", "code", "prose", "60.0 %", "step-00000010", "run_started", "Loss", "Speed"):
        assert words in seen.text
    assert text.count("<circle") == 6  # validation: three of each source
    assert "prefers-color-scheme:dark" in text


def test_nothing_hostile_gets_in_and_nothing_is_fetched(tmp_path: Path) -> None:
    more = {"source_loss": {HOSTILE: 3.0}, "source_tokens": {HOSTILE: 5}}
    journal = [
        {"kind": "rollback", "step": 1, "time": 1e300, "by": HOSTILE, "data": {HOSTILE: HOSTILE}},
        {"kind": "resumed", "step": HOSTILE, "time": None, "data": [HOSTILE]},
    ]
    folder = write(tmp_path / "a<b>&c", [record(0, 3.0, **more), record(1, 3.0, **more)], journal)
    text = page(load_run(folder))
    seen = Seen(text)
    assert {"script", "img", "link", "iframe", "a"}.isdisjoint(seen.tags)
    assert {"src", "href", "onerror", "onload", "srcset"}.isdisjoint(seen.attributes)
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert "alert('1')" in seen.text  # shown as what it is
    assert seen.text.count("a<b>&c") == 2


def test_what_is_drawn_is_inside_and_in_its_place() -> None:
    steps = np.arange(1000, dtype=np.float64)
    values = 9.0 - steps / 200
    values[500] = 1e6  # one wild value does not flatten the others
    values[10] = math.nan
    drawn = Chart("t", "", steps, [Line("all", values, "ink")]).svg()
    lines = [re.findall(r"([\d.]+),([\d.]+)", points) for points in re.findall(r'points="([^"]+)"', drawn)]
    assert len(lines) == 2
    for line in lines:
        xy = np.array(line, dtype=np.float64)
        assert ((xy[:, 0] >= LEFT) & (xy[:, 0] <= 640 - RIGHT)).all()
        assert ((xy[:, 1] >= TOP) & (xy[:, 1] <= HEIGHT - BOTTOM)).all()
    raw = np.array(lines[0], dtype=np.float64)
    assert raw[0, 1] < raw[200, 1] < raw[-1, 1]  # it falls
    assert "not finite at step 10" in drawn


@pytest.mark.parametrize("values", [[math.nan], [5.0], [0.0, 0.0], [math.inf, 1.0], [1e-300, 1e300]])
def test_odd_values_draw_too(values: list[float]) -> None:
    steps = np.arange(len(values), dtype=np.float64)
    drawn = Chart("t", "", steps, [Line("all", np.array(values), "ink")]).svg()
    assert "nan" not in drawn
    Seen(drawn)
    assert ("no finite value" in drawn) == (not np.isfinite(values).any())


def test_many_sources_are_all_in_the_table_and_the_largest_in_the_plot(tmp_path: Path) -> None:
    losses = {f"source{number:03}": 3.0 for number in range(40)}
    tokens = {name: 10 + number for number, name in enumerate(losses)}
    run = load_run(write(tmp_path / "run", [record(0, 1.0, source_loss=losses, source_tokens=tokens)]))
    text = page(run)
    assert len(re.findall(r"<td class=\"text\">source\d+</td>", text)) == 40
    assert len(re.findall(r"</svg>source\d+</li>", text)) == 2 * MOST_SOURCES
    assert "</svg>source039</li>" in text


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_ticks_are_round_few_and_inside(low: float, span: float, most: int) -> None:
    high = low + span
    if high - low < 1e-9 * abs(low):
        return
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    for gap in np.diff(found):
        assert f"{gap:.4e}"[0] in "125"
