"""Reports: the numbers from a folder's records, and a plot that draws what they say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ConfigError
from pretrain.metrics.jsonl import encode
from pretrain.report import load_run, plot, series, smooth, summarise, thin


def record(step: int, code: float, prose: float | None = None, **more) -> dict:
    losses = {"code": code} | ({} if prose is None else {"prose": prose})
    tokens = dict.fromkeys(losses, 100)
    return {
        "step": step,
        "tokens": (step + 1) * 200,
        "loss": sum(losses.values()) / len(losses),
        "tokens_per_s": 50.0,
        "data_wait_s": 0.5,
        "source_loss": losses,
        "source_tokens": tokens,
        **more,
    }


def write(folder: Path, records: list[dict], journal: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode, records)))
    if journal is not None:
        (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in journal))
    return folder


def example(folder: Path) -> Path:
    records = [
        {"step": 0, "val_loss": {"code": 8.0, "prose": 10.0}},
        record(0, 8.0, 10.0, step_s=4.0),
        record(1, 6.0, None, step_s=2.0),
        {"step": 2, "val_loss": {"code": 5.0, "prose": 9.0}},
        record(2, 4.0, 9.0, step_s=4.0),
        {"step": 3, "val_loss": {"code": 4.0, "prose": 6.5}},
    ]
    for name in ("step-00000002", "step-00000010", "step-00000012.partial"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    return write(folder, records, [{"kind": "run_started"}, {"kind": "run_finished"}])


def test_the_numbers(tmp_path: Path) -> None:
    summary = summarise(load_run(example(tmp_path / "run")))
    assert (summary.steps, summary.tokens, summary.training_s) == (3, 600, 10.0)
    assert summary.tokens_per_s == 50.0  # 500 tokens in 10 s
    assert summary.data_wait == pytest.approx(0.15)
    assert (summary.first_loss, summary.last_loss) == (9.0, pytest.approx((9.0 + 6.0 + 6.5) / 3))
    assert summary.checkpoint == "checkpoints/step-00000010"
    assert summary.finished
    code, prose = summary.sources
    assert (code.name, code.tokens, code.share, code.last_loss) == ("code", 300, 0.6, 6.0)
    assert (code.first_val_loss, code.last_val_loss, code.fall) == (8.0, 4.0, 0.5)
    assert (prose.tokens, prose.last_loss, prose.fall) == (200, 9.5, pytest.approx(0.35))
    assert json.loads(summary.to_json())["sources"][0]["fall"] == 0.5


def test_a_run_that_still_writes_or_never_evaluated(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [record(0, 8.0)], [{"kind": "run_started"}])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "los')
    summary = summarise(load_run(folder))
    assert (summary.steps, summary.finished, summary.checkpoint) == (1, False, None)
    assert summary.training_s == 2.0  # no step_s in the record: from its tokens and speed
    assert [(s.first_val_loss, s.last_val_loss, s.fall) for s in summary.sources] == [(None, None, None)]
    plot(load_run(folder), tmp_path / "a.png")


def test_a_resumed_run_is_not_finished_by_its_earlier_end(tmp_path: Path) -> None:
    kinds = ("run_started", "run_finished", "resumed", "checkpoint")
    folder = write(tmp_path / "run", [record(0, 8.0)], [{"kind": kind} for kind in kinds])
    assert not summarise(load_run(folder)).finished


def test_one_evaluation_shows_no_fall(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [record(0, 8.0), {"step": 1, "val_loss": {"code": 7.0}}])
    assert summarise(load_run(folder)).sources[0].fall is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such run"),
        (lambda folder: folder.write_text(""), "not a folder"),
        (lambda folder: folder.mkdir(), "no metrics.jsonl"),
        (lambda folder: write(folder, []), "no training record"),
        (lambda folder: write(folder, [{"step": 0, "val_loss": {"a": 1.0}}]), "no training record"),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        load_run(tmp_path / "run")


@given(st.integers(1, 60), st.integers(0, 20), st.floats(-5, 5), st.floats(-1, 1))
def test_smoothing_does_not_lag(count: int, reach: int, start: float, slope: float) -> None:
    """A straight line stays where it is, up to both ends."""
    line = start + slope * np.arange(count)
    np.testing.assert_allclose(smooth(line, reach), line, atol=1e-8)


def test_smoothing_takes_noise_away_also_at_the_ends() -> None:
    noise = np.random.default_rng(0).normal(size=(200, 300))
    smoothed = np.array([smooth(row, 20) for row in noise])
    assert smoothed[:, 100].std() < 0.25
    assert smoothed[:, [0, -1]].std() < 0.55
    assert np.array_equal(smooth(noise[0], 0), noise[0])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=50), st.integers(1, 60))
def test_thinning_keeps_the_means(values: list[float], most: int) -> None:
    thinned = thin(np.array(values), most)
    assert len(thinned) <= most
    size = -(-len(values) // most)
    expected = [np.mean(values[at : at + size]) for at in range(0, len(values), size)]
    np.testing.assert_allclose(thinned, expected, atol=1e-12)


def drawn(path: Path) -> "np.ndarray":
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def has_colour(picture: "np.ndarray", colour: str) -> bool:
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return bool((picture == wanted).all(axis=-1).sum() > 50)


def test_the_plot_has_every_source_and_the_total(tmp_path: Path) -> None:
    run = load_run(example(tmp_path / "run"))
    plot(run, tmp_path / "two.png")
    picture = drawn(tmp_path / "two.png")
    assert picture.shape[1] == 1500
    assert all(has_colour(picture, colour) for colour in ("#000000", "#0072B2", "#D55E00"))
    assert not has_colour(picture, "#009E73")  # the third source's
    assert not has_colour(picture, "#b00020")  # "not finite"


def test_a_loss_that_is_not_finite_is_marked_and_breaks_nothing(tmp_path: Path) -> None:
    records = [record(step, 5.0 + (math.nan if step == 7 else step / 10), 6.0) for step in range(40)]
    records[9] = record(9, math.inf, 6.0)
    folder = write(tmp_path / "run", [*records, {"step": 40, "val_loss": {"code": math.nan}}])
    run = load_run(folder)
    assert math.isnan(series(run, "code")[7])
    plot(run, tmp_path / "a.png")
    assert has_colour(drawn(tmp_path / "a.png"), "#b00020")
    all_broken = write(tmp_path / "broken", [record(0, math.nan)])
    plot(load_run(all_broken), tmp_path / "b.png")
    assert summarise(load_run(all_broken)).sources[0].last_loss is None


def test_many_sources_and_many_steps(tmp_path: Path) -> None:
    names = [f"source-{n}" for n in range(20)]
    records = [
        {**record(step, 1.0), "source_loss": {name: 5.0 + at - step / 4500 for at, name in enumerate(names)}}
        for step in range(9000)
    ]
    plot(load_run(write(tmp_path / "run", records)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_numbers_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    records = [record(step, math.nan if step else math.inf, step_s=1.0) for step in range(3)]
    text = summarise(load_run(write(tmp_path / "run", records))).to_json()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(text, parse_constant=refuse)
    assert (found["first_loss"], found["last_loss"]) == ("Infinity", "NaN")


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    from typer import Typer
    from typer.testing import CliRunner

    from pretrain.cli.report import report

    app = Typer()
    app.command()(report)
    run = example(tmp_path / "run [x]")
    table = CliRunner().invoke(app, [str(run)], env={"COLUMNS": "100"})
    assert table.exit_code == 0, table.output
    assert "run [x]" in table.output
    assert "50.0%" in table.output
    assert (run / "report.png").exists()
    result = CliRunner().invoke(app, [str(run), "--json", "--out", str(tmp_path / "deep" / "er" / "plot.png")])
    assert json.loads(result.output)["steps"] == 3
    assert (tmp_path / "deep" / "er" / "plot.png").exists()
