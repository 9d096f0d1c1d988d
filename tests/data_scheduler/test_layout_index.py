"""What is kept about files shortens a start and changes nothing."""

import logging
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scheduler import layout_index
from data_scheduler.config import SourceConfig
from data_scheduler.layout_index import LayoutIndex
from data_scheduler.manifest import Manifest
from headrace.errors import DataError

FILES = 80


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    for number in range(FILES):
        folder = tmp_path / "data" / str(number % 7)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{number}.parquet", number + 1)
    return SourceConfig.model_validate({"name": "many", "paths": [str(tmp_path / "data")]})


def write(path: Path, rows: int, age_s: int = 100) -> None:
    pq.write_table(pa.table({"text": ["water"] * rows}), path, row_group_size=40, compression="none")
    when = path.stat().st_mtime_ns - age_s * 10**9
    os.utime(path, ns=(when, when))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files whose footers were read."""
    paths: list[str] = []
    look = layout_index.column_layout
    monkeypatch.setattr(layout_index, "column_layout", lambda path, format: paths.append(path) or look(path, format))
    return paths


def test_unchanged_files_are_not_opened_again(tmp_path: Path, source: SourceConfig, opened: list[str]) -> None:
    expected = Manifest.take(source)
    assert len(opened) == FILES
    index = tmp_path / "cache" / "index.sqlite"
    assert Manifest.take(source, LayoutIndex(index)) == expected
    assert len(opened) == 2 * FILES
    opened.clear()
    assert Manifest.take(source, LayoutIndex(index)) == expected
    assert opened == []
    changed = tmp_path / "data" / "3" / "3.parquet"
    write(changed, 90, age_s=50)
    assert Manifest.take(source, LayoutIndex(index)).row_groups[str(changed)][0][0] == 40
    assert opened == [str(changed)]


def test_the_manifest_is_the_same_for_any_threads_and_order_of_files(
    source: SourceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_index, "THREADS", 1)
    one = Manifest.take(source)
    monkeypatch.setattr(layout_index, "THREADS", 32)
    assert Manifest.take(source) == one
    assert list(Manifest.take(source).row_groups) == list(one.row_groups) == [path for path, _ in one.files]
    assert [path for path, _ in one.files] == sorted(path for path, _ in one.files)


def test_a_file_that_may_change_within_the_clocks_tick_is_not_kept(
    tmp_path: Path, source: SourceConfig, opened: list[str]
) -> None:
    index = tmp_path / "cache" / "index.sqlite"
    young = tmp_path / "data" / "5" / "5.parquet"
    write(young, 6, age_s=0)
    Manifest.take(source, LayoutIndex(index))
    opened.clear()
    Manifest.take(source, LayoutIndex(index))
    assert opened == [str(young)]


@pytest.mark.parametrize("trouble", ["rubbish", "folder", "other table"])
def test_an_index_that_cannot_be_used_is_one_warning(
    tmp_path: Path, source: SourceConfig, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache" / "index.sqlite"
    path.parent.mkdir()
    if trouble == "folder":
        path.mkdir()
    elif trouble == "rubbish":
        path.write_bytes(b"not a database, far from it" * 100)
    else:
        import sqlite3

        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE layouts (x)")
    with caplog.at_level(logging.WARNING):
        assert Manifest.take(source, LayoutIndex(path)) == Manifest.take(source)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["data.cache_dir"]


def test_a_broken_file_is_found_every_time_and_the_first_is_named(
    tmp_path: Path, source: SourceConfig, opened: list[str]
) -> None:
    for name in ("6/6.parquet", "2/9.parquet"):
        path = tmp_path / "data" / name
        path.write_bytes(b"PAR1 not really")
        os.utime(path, (1, 1))
    index = tmp_path / "cache" / "index.sqlite"
    for _ in range(2):
        manifest = Manifest.take(source, LayoutIndex(index))
        assert manifest.row_groups[str(tmp_path / "data" / "6" / "6.parquet")] == [(1, 0)]
    assert len(opened) == FILES + 2
    strict = source.model_copy(update={"on_error": "stop"})
    with pytest.raises(DataError, match=r"source 'many': .*/2/9\.parquet: not readable"):
        Manifest.take(strict, LayoutIndex(index))


def test_remote_files_are_known_by_what_their_store_says(tmp_path: Path, opened: list[str]) -> None:
    store = fsspec.filesystem("memory")
    for number in range(FILES):
        with store.open(f"/index/{number}.parquet", "wb") as file:
            pq.write_table(pa.table({"text": ["water"] * (number + 1)}), file)
    source = SourceConfig.model_validate({"name": "far", "paths": ["memory://index/"]})
    index = tmp_path / "index.sqlite"
    first = Manifest.take(source, LayoutIndex(index))
    assert len(opened) == FILES
    assert Manifest.take(source, LayoutIndex(index)) == first
    assert len(opened) == FILES
    with store.open("/index/7.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["steam"] * 8}), file)
    Manifest.take(source, LayoutIndex(index))
    assert opened[FILES:] == ["memory:///index/7.parquet"]
    store.rm("/index", recursive=True)
