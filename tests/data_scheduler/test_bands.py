"""Bands: every record in exactly one, whatever the format; edges measured once; strays counted once."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banded_sources import Make, Row, bands_of_source, encoder_of, read_all, rows_of, source, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_scheduler import Scheduler
from data_scheduler.band_edges import measure
from data_scheduler.bands import BandFilter, band_of, is_number
from data_scheduler.chunks import cut_pieces
from data_scheduler.config import BandConfig
from data_scheduler.copies import CopyFolder
from data_scheduler.formats import records as records_module
from data_scheduler.manifest import Manifest
from data_scheduler.source import SourceReader
from data_scheduler.unit_cache import UnitCache
from headrace.errors import ConfigError, DataError

numbers = st.one_of(st.integers(-5, 5), st.floats(-3, 3), st.floats(allow_nan=False, allow_infinity=False))


# -- which band --------------------------------------------------------------------------------------------------


@given(
    st.lists(numbers, min_size=1, max_size=6, unique_by=float), numbers, st.sampled_from(["ascending", "descending"])
)
def test_every_number_is_in_exactly_one_interval(edges: list[float], value: float, order: str) -> None:
    edges = sorted(set(map(float, edges)))
    lows, highs = [-math.inf, *edges], [*edges, math.inf]
    inside = [number for number, (low, high) in enumerate(zip(lows, highs, strict=True), 1) if low <= value < high]
    assert len(inside) == 1
    assert band_of(value, edges, order) == (inside[0] if order == "ascending" else len(lows) + 1 - inside[0])
    one = {"of": "s", "by": "q", "order": order, "edges": edges, "measured": True, "from_text": False}
    bands = [BandConfig(number=n + 1, shares=[1.0] * len(lows), **one) for n in range(len(lows))]  # type: ignore[arg-type]
    holding = [band.number for band in bands if BandFilter(band).holds(value)]
    assert holding == [band_of(value, edges, order)]


@pytest.mark.parametrize(
    ("value", "good"),
    [
        (1, True),
        (0.5, True),
        (10**400, False),
        (True, False),
        (None, False),
        ("0.5", False),
        (math.nan, False),
        (math.inf, False),
    ],
)
def test_what_is_a_number(value: Any, good: bool) -> None:
    assert is_number(value) is good


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.one_of(st.sampled_from([0, 0.5, 1, 1.0, 2]), numbers), min_size=2, max_size=60),
    count=st.integers(2, 5),
    order=st.sampled_from(["ascending", "descending"]),
)
def test_every_record_is_in_exactly_one_band_ties_and_edges_included(
    data_config: Make, tmp_path: Path, values: list[float], count: int, order: str
) -> None:
    rows = [{"text": f"document {number} " + "x" * (number % 7), "q": value} for number, value in enumerate(values)]
    path = write(tmp_path, "x.jsonl", rows)
    config = source([path], bands={"by": "q", "count": count, "order": order})
    different = len({float(value) for value in values})
    if different < count:
        with pytest.raises(ConfigError, match=f"{different} different value"):
            bands_of_source(config)
        return
    data = data_config(lanes=2, global_batch_size=2)
    easiest, found = -math.inf, []
    for band in bands_of_source(config):
        reader = read_all(band, data)
        assert reader.found, "no band is empty"  # type: ignore[attr-defined]
        found += reader.found  # type: ignore[attr-defined]
        own = [values[int(text.split()[1])] * (1 if order == "ascending" else -1) for text in reader.found]  # type: ignore[attr-defined]
        assert min(own) > easiest, "bands do not overlap, and ties stay together"
        easiest = max(own)
    assert Counter(found) == Counter(row["text"] for row in rows)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.arrow", "x.csv"])
def test_bands_of_every_format_hold_the_same(data_config: Make, tmp_path: Path, name: str) -> None:
    rows = rows_of(400)
    path = write(tmp_path, name, rows)
    data = data_config(lanes=4, global_batch_size=4, chunk_bytes=4096)  # several chunks of every unit
    expected = bands_of_source(source([write(tmp_path, "plain.jsonl", rows)]))
    bands = bands_of_source(source([path]))
    assert [band.band for band in bands] == [band.band for band in expected]
    edges = bands[0].band.edges if bands[0].band else []
    for number, band in enumerate(bands, 1):
        own = [row["text"] for row in rows if band_of(row["q"], edges, "ascending") == number]
        assert Counter(read_all(band, data).found) == Counter(own)  # type: ignore[attr-defined]


def test_bands_hold_equal_text_and_carry_the_weight(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", rows_of(4000))
    bands = bands_of_source(source([path], bands={"by": "q", "count": 4}, weight=2.0))
    assert [band.name for band in bands] == ["s.1", "s.2", "s.3", "s.4"]
    assert sum(band.weight for band in bands) == pytest.approx(2.0)
    assert all(band.weight == pytest.approx(0.5, rel=0.02) for band in bands)


def test_quantiles_are_of_text_not_of_records(tmp_path: Path) -> None:
    # Nine texts of 10 characters and one of 90: half of the text is that one.
    rows = [{"text": "x" * 10, "q": number} for number in range(9)] + [{"text": "x" * 90, "q": 9}]
    config = source([write(tmp_path, "x.jsonl", rows)], bands={"by": "q", "count": 2})
    band = measure(config, Manifest.take(config))
    assert (band.edges, band.shares) == ([9.0], [0.5, 0.5])


def test_a_large_source_is_sampled_and_its_quantiles_are_near(tmp_path: Path) -> None:
    # 40 MB, sorted by the number: the worst for a sample of stretches.
    rows = [{"text": f"{number} " + "y" * 990, "q": number / 40_000} for number in range(40_000)]
    path = write(tmp_path, "x.jsonl", rows)
    config = source([path], bands={"by": "q", "count": 4})
    edges = measure(config, Manifest.take(config)).edges
    assert edges == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    assert measure(config, Manifest.take(config)).edges == edges


def test_length_is_known_without_a_field_and_a_field_of_that_name_comes_first(tmp_path: Path) -> None:
    rows = [{"text": "x" * (number + 1)} for number in range(100)]
    bands = {"by": "length", "edges": [50.5]}
    config = source([write(tmp_path, "x.parquet", rows)], bands=bands)
    band = measure(config, Manifest.take(config))
    assert band.from_text
    assert band.shares[0] == pytest.approx(50 * 51 / 2 / (100 * 101 / 2))
    (tmp_path / "t").mkdir()
    for number in range(4):
        (tmp_path / "t" / f"{number}.txt").write_text("x" * 30 * (number + 1))
    texts = source([str(tmp_path / "t")], bands=bands)
    assert measure(texts, Manifest.take(texts)).shares == pytest.approx([30 / 300, 270 / 300])
    config = source([write(tmp_path, "y.jsonl", [row | {"length": 7 * n} for n, row in enumerate(rows)])], bands=bands)
    assert not measure(config, Manifest.take(config)).from_text


def test_nested_fields_and_filters(data_config: Make, tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "meta": {"q": n, "lang": "de" if n % 2 else "en"}} for n in range(40)]
    given = {"bands": {"by": "meta.q", "edges": [20]}, "where": "meta.lang == 'de'"}
    easy, hard = bands_of_source(source([write(tmp_path, "x.jsonl", rows)], **given))
    data = data_config(lanes=2, global_batch_size=2)
    assert sorted(read_all(easy, data).found) == sorted(f"t{n}" for n in range(1, 20, 2))  # type: ignore[attr-defined]
    assert sorted(read_all(hard, data).found) == sorted(f"t{n}" for n in range(21, 40, 2))  # type: ignore[attr-defined]


# -- what is in no band ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".zst"])
@pytest.mark.parametrize("token_cache", [False, True])
def test_a_stray_is_rejected_once_not_once_a_band(
    data_config: Make, tmp_path: Path, suffix: str, token_cache: bool
) -> None:
    rows: list[Any] = list(rows_of(3000))
    bad = {7: {"text": "none"}, 50: {"text": "nan", "q": "high"}, 99: b"{torn", 400: {"text": "no", "q": None}}
    bad |= {1500: {"text": 3, "q": 0.99}, 2000: {"text": "true", "q": True}}
    for place, row in bad.items():
        rows[place] = row
    path = write(tmp_path, f"x.jsonl{suffix}", rows)
    changes = {"token_cache": str(tmp_path / "cache")} if token_cache else {}
    data = data_config(lanes=4, global_batch_size=4, chunk_bytes=8192, **changes)
    for _ in range(2):  # the second time from the token cache, where there is one
        rejects, documents = [], 0
        for band in bands_of_source(source([path], max_reject_fraction=0.01)):
            reader = SourceReader(band, Manifest.take(band), data, encoder_of(data.tokenizer), UnitCache())
            for chunk in range(len(reader.chunks)):
                documents += len(reader.open(chunk)[1])
            rejects += [(reject.source, reject.reason.split("(")[0]) for reject in reader.rejects]
        assert documents + len(rejects) == len(rows)
        assert sorted(source for source, _ in rejects) == ["s.1"] * 5 + ["s.3"], "the last has a number: its band's"
        assert any("field 'q' is 'high', not a number" in reason for _, reason in rejects)


def test_strays_are_measured_against_the_whole_source(data_config: Make, tmp_path: Path) -> None:
    # 2 of 3,000 records: within 0.001 of the source, though past 0.001 of the first of its bands.
    rows = rows_of(3000)
    del rows[10]["q"], rows[2500]["q"]
    path = write(tmp_path, "x.jsonl", rows)
    data = data_config(lanes=2, global_batch_size=2)
    assert len(read_all(bands_of_source(source([path]))[0], data).rejects) == 2
    for place in (5, 6):
        del rows[place]["q"]
    with pytest.raises(DataError, match=r"[34] of \d+ records rejected, past max_reject_fraction"):
        read_all(bands_of_source(source([write(tmp_path, "y.jsonl", rows)]))[0], data)


def test_a_file_that_cannot_be_read_is_one_reject(data_config: Make, tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{number}.jsonl.gz", rows_of(50, number)) for number in range(3)]
    bands = bands_of_source(source(paths))
    manifests = [Manifest.take(band) for band in bands]
    Path(paths[1]).unlink()
    data = data_config(lanes=1, global_batch_size=1)
    rejects = []
    for band, manifest in zip(bands, manifests, strict=True):
        reader = SourceReader(band, manifest, data, encoder_of(data.tokenizer), UnitCache())
        for chunk in range(len(reader.chunks)):
            reader.records(chunk)
        rejects += reader.rejects
    assert {reject.source for reject in rejects} == {"s.1"}
    assert {reject.file for reject in rejects} == {paths[1]}


def test_parts_of_records_keep_count_of_what_is_elsewhere() -> None:
    found = records_module.Records()
    for number in range(12):
        if number % 4 == 0:
            found.leave_to_others()
        elif number % 4 == 1:
            found.reject("stray")
        elif number % 4 == 2:
            found.reject("own", own=True)
        else:
            found.documents.append(f"{number}")
    for parts in (range(0, 12, 5), range(3, 9), range(12)):
        part = found.only(parts)
        assert (len(part.documents), part.read) == (len(parts), len(parts))
        kept = part.without_strays()
        assert [reject.reason for reject in kept.rejects] == ["own" for place in parts if place % 4 == 2]
        good = sum(text is not None for text in kept.documents)
        assert good + len(kept.rejects) + kept.filtered == len(parts)


# -- what cannot be split ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "bands", "said"),
    [
        ([{"text": "a", "n": 1}], {"by": "q", "count": 2}, "no record has a number in 'q' (fields: text, n)"),
        ([{"text": "a", "q": "x"}], {"by": "q", "count": 2}, "no record has a number in 'q' (it holds str)"),
        (
            [{"text": "a", "q": 1.5}] * 9,
            {"by": "q", "count": 2},
            "9 records have 1 different value of 'q', fewer than 2",
        ),
        (
            [{"text": "a", "q": n} for n in range(9)],
            {"by": "q", "edges": [5, 99]},
            "band s.3 has no text among 9 records",
        ),
        ([{"text": "", "q": n} for n in range(9)], {"by": "q", "count": 2}, "no record of the sample has any text"),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(
    tmp_path: Path, rows: list[Row], bands: dict[str, Any], said: str
) -> None:
    for name in ("x.jsonl", "x.parquet"):
        config = source([write(tmp_path, name, rows)], bands=bands)
        with pytest.raises(ConfigError) as error:
            measure(config, Manifest.take(config))
        message = str(error.value)
        if name == "x.parquet" and "fields: text, n" in said:
            said = "no record has a number in 'q' (no column 'q' (columns: text, n))"
        assert message.startswith("data.sources.s.bands")
        assert said in message
        assert "\n" not in message


def test_token_files_have_no_bands(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100, dtype=np.uint16))
    config = source([str(tmp_path / "x.npy")])
    with pytest.raises(ConfigError, match="holds token ids"):
        measure(config, Manifest.take(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bands": {"by": "q", "count": 1}}, "greater than or equal to 2"),
        ({"bands": {"by": "q"}}, "either count or edges"),
        ({"bands": {"by": "q", "count": 2, "edges": [1.0]}}, "either count or edges"),
        ({"bands": {"by": "q", "edges": [1.0, 1.0]}}, "edges must ascend, got 1, 1"),
        ({"bands": {"by": "q", "edges": [math.inf]}}, "finite"),
        ({"min_share": 0.1}, "min_share and max_share bound one source"),
    ],
)
def test_impossible_bands_are_refused(changes: Row, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source(["x"], **changes)


def test_a_name_that_is_a_bands_is_refused(data_config: Make) -> None:
    sources = [source(["x"]).model_dump(), {"name": "s.2", "paths": ["y"]}]
    with pytest.raises(ValueError, match=r"source name used twice: s\.2"):
        data_config(sources=sources)


def test_least_shares_must_leave_room_for_all_bands(data_config: Make, tmp_path: Path) -> None:
    sources = [source([write(tmp_path, "x.jsonl", rows_of(100))], bands={"by": "q", "count": 4}).model_dump()]
    config = data_config(sources=sources, policy={"guard": {"min_share": 0.3}})
    with pytest.raises(ConfigError, match=r"guard.min_share: of each of 4 sources, bands included, it is 1.2 in all"):
        Scheduler(config)


def test_bands_share_the_copies_of_a_large_file(
    data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    opened = CopyFolder.open

    def counting(self: CopyFolder, key: str, *rest: Any) -> Any:
        made.append(key)
        return opened(self, key, *rest)

    monkeypatch.setattr("data_scheduler.chunks.HELD_TEXT", 1)
    monkeypatch.setattr(CopyFolder, "open", counting)
    rows = rows_of(3000)
    path = write(tmp_path, "x.jsonl.zst", rows)
    data = data_config(lanes=4, global_batch_size=4, chunk_bytes=4096, cache_dir=str(tmp_path / "cache"))
    found: list[str] = []
    for band in bands_of_source(source([path])):
        assert cut_pieces(Manifest.take(band).pieces(band), 4096, 4).copied.any()
        found += read_all(band, data).found  # type: ignore[attr-defined]
    assert Counter(found) == Counter(row["text"] for row in rows)
    assert len(set(made)) == 1
