"""Bands in a run: edges are those it began with, bands draw and resume like any source."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banded_sources import Make, Row, rows_of, source, write

from data_scheduler import DataConfig, Scheduler
from data_scheduler.config import BandConfig
from data_scheduler.curriculum import banded
from headrace.errors import ConfigError, DataError


@pytest.fixture
def graded(data_config: Make, tmp_path: Path) -> Make:
    """Source s in bands and source t without, of `tmp_path`."""

    def make(**changes: Any) -> DataConfig:
        folder = tmp_path / "in"
        if not folder.exists():
            write(folder, "x.jsonl", rows_of(600))
            write(tmp_path / "other", "y.jsonl", rows_of(200, 1))
        bands = changes.pop("bands", {"by": "q", "count": 3})
        sources = [
            source([str(folder)], bands=bands, weight=3.0).model_dump(),
            {"name": "t", "paths": [str(tmp_path / "other")]},
        ]
        settled: dict[str, Any] = {"sources": sources, "lanes": 12, "global_batch_size": 12, "chunk_bytes": 2048}
        return data_config(**settled | changes)

    return make


def test_edges_are_those_the_run_began_with(graded: Make, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = Scheduler(graded(), run_dir=run_dir)
    began = [next(first).digests for _ in range(6)]
    assert first.names == ["s.1", "s.2", "s.3", "t"]
    # The file changes into one of the same size with other numbers: its edges would be others.
    path = tmp_path / "in" / "x.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"q": 0.1', b'"q": 0.9'))
    again = Scheduler(graded(), run_dir=run_dir)
    assert [one.band for one in again.config.sources] == [one.band for one in first.config.sources]
    assert banded(graded()).sources[0].band != first.config.sources[0].band
    path.write_bytes(content)
    resumed = Scheduler(graded(), run_dir=run_dir)
    assert [next(resumed).digests for _ in range(6)] == began


@pytest.mark.parametrize(
    "bands", [{"by": "q", "count": 2}, {"by": "q", "count": 3, "order": "descending"}, {"by": "q", "edges": [0.3, 0.6]}]
)
def test_a_run_keeps_its_bands(graded: Make, tmp_path: Path, bands: Row) -> None:
    Scheduler(graded(), run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"data.sources.s.bands: the run has 3 bands by q, ascending, measured edges"):
        Scheduler(graded(bands=bands), run_dir=tmp_path / "run")


def test_a_written_band_must_be_the_runs(graded: Make, tmp_path: Path) -> None:
    config = Scheduler(graded(), run_dir=tmp_path / "run").config
    sources = [one.model_dump() for one in config.sources]
    assert Scheduler(config, run_dir=tmp_path / "run").names == ["s.1", "s.2", "s.3", "t"]
    sources[1]["band"]["edges"][0] += 0.01
    with pytest.raises(ConfigError, match=r"data.sources.s.2.band is not what it was"):
        Scheduler(graded(sources=sources), run_dir=tmp_path / "run")
    sources[1]["band"]["edges"] = [0.1]
    with pytest.raises(ValueError, match="written by a run"):
        BandConfig.model_validate(sources[1]["band"])


def test_bands_can_join_a_run_with_a_new_source(graded: Make, tmp_path: Path) -> None:
    both = graded().sources
    Scheduler(graded(sources=[both[1].model_dump()]), run_dir=tmp_path / "run")
    resumed = Scheduler(graded(sources=[both[1].model_dump(), both[0].model_dump()]), run_dir=tmp_path / "run")
    assert resumed.names == ["t", "s.1", "s.2", "s.3"]
    assert [event.data["source"]["band"]["number"] for event in resumed.journal.of("source_added")] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"data\.sources\.t\.bands: the source entered the run without"):
        Scheduler(
            graded(sources=[both[1].model_copy(update={"bands": both[0].bands}).model_dump(), both[0].model_dump()]),
            run_dir=tmp_path / "run",
        )


def test_static_weights_draw_from_bands_as_if_there_were_none(graded: Make) -> None:
    running = Scheduler(graded())
    drawn = np.zeros(4)
    for _ in range(100):
        drawn += np.bincount(next(running).source_ids, minlength=4)
    assert drawn / drawn.sum() == pytest.approx([0.25, 0.25, 0.25, 0.25], abs=0.02)


def test_every_document_of_every_band_is_seen_in_an_epoch(graded: Make, tmp_path: Path) -> None:
    config = graded(seq_len=15, lanes=2, global_batch_size=2)
    for one in config.sources:
        one.max_epochs = 1
    running = Scheduler(config.model_copy(update={"policy": config.policy.model_copy(update={"horizon": 4})}))
    seen: Counter[tuple[str, int]] = Counter()
    with pytest.raises(DataError, match="max_epochs"):
        while True:
            batch = next(running)
            for row, number in enumerate(batch.source_ids.tolist()):
                for document, begin in zip(batch.segment_ids[row].tolist(), batch.offsets[row].tolist(), strict=True):
                    seen[running.names[number], document] += begin == 0
            exhausted = [running.names[number] for number in np.flatnonzero(batch.exhausted).tolist()]
            running.feedback(batch.step, {}, {}, exhausted)
    assert set(seen.values()) == {1}
    assert sum(name != "t" for name, _ in seen) > 500, "but for what was left in lanes that ended in mid-sequence"
    assert len({document for name, document in seen if name != "t"}) == sum(name != "t" for name, _ in seen)


def test_a_stage_gives_the_weight_of_a_source_to_its_bands(data_config: Make, tmp_path: Path) -> None:
    """By their parts of its text; a run that goes on from its journal is left as it is."""
    path = write(tmp_path / "data", "s.jsonl", rows_of(300))
    other = write(tmp_path / "data", "other.jsonl", rows_of(100, 1))
    sources = [source([path], weight=2.0).model_dump(), {"name": "other", "paths": [other]}]
    stages = [{"from_step": 4, "weights": {"s": 3.0, "other": 1.0}}, {"from_step": 6, "weights": {"s": 1.0}}]
    config = data_config(sources=sources, stages=stages)
    whole = banded(config)
    shares = whole.sources[0].band.shares  # type: ignore[union-attr]
    names = ["s.1", "s.2", "s.3"]
    assert whole.stages[0].weights == {n: 3.0 * share for n, share in zip(names, shares, strict=True)} | {"other": 1.0}
    assert banded(whole) == whole
    scheduler = Scheduler(config)
    for _ in range(8):
        batch = next(scheduler)
    assert set(batch.source_ids.tolist()) <= {0, 1, 2}
    again = DataConfig.model_validate(scheduler.journal.of("run_started")[0].data["data"])
    assert again.stages == whole.stages
