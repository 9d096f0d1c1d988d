"""The list of files survives the journal, and the files are held to it."""

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler.config import SourceConfig
from data_scheduler.manifest import Manifest, check_unchanged
from headrace.errors import ConfigError, DataError

names = st.text(st.sampled_from("ab/.ü "), min_size=1, max_size=8)
layouts = st.none() | st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3)


@given(st.dictionaries(names, st.tuples(st.integers(0, 10**12), layouts), max_size=8))
def test_a_manifest_reads_back_from_the_journal(files: dict[str, tuple[int, list[tuple[int, int]] | None]]) -> None:
    manifest = Manifest(
        "s",
        [(path, size) for path, (size, _) in sorted(files.items())],
        {path: layout for path, (_, layout) in sorted(files.items()) if layout is not None},
    )
    assert Manifest.from_data(orjson.loads(orjson.dumps(manifest.to_data()))) == manifest


def test_ten_thousand_files_are_half_a_megabyte_of_journal() -> None:
    folder = "/a/store/somewhere/with/a/long/name/of/its/own/crawl=2024-10/language=en"
    files = [
        (f"{folder}/bucket-{number // 1000:02d}/part-{number:05d}.jsonl.zst", 123_456_789) for number in range(10_000)
    ]
    assert len(orjson.dumps(Manifest("s", files, {}).to_data())) < 400_000


def test_folders_globs_and_files_are_listed_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/deep/er/3.jsonl.gz", "a/.hidden.jsonl", "a/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "a" / "link.jsonl").symlink_to(tmp_path / "b" / "2.jsonl")
    (tmp_path / "a" / "circle").symlink_to(tmp_path / "a")
    paths = [
        str(tmp_path / "b"),
        str(tmp_path / "a"),
        str(tmp_path / "*" / "1.jsonl"),
        str(tmp_path / "a" / "notes.md"),
    ]
    source = SourceConfig.model_validate({"name": "s", "paths": paths, "format": "jsonl"})
    found = [Path(path).relative_to(tmp_path).as_posix() for path, _ in Manifest.take(source).files]
    assert found == ["a/1.jsonl", "a/deep/er/3.jsonl.gz", "a/link.jsonl", "a/notes.md", "b/2.jsonl"]
    (tmp_path / "a" / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"gone\.jsonl: No such file or directory \(a link that leads nowhere"):
        Manifest.take(source)


def test_the_first_file_that_changed_is_named_among_many(tmp_path: Path) -> None:
    for number in range(700):
        (tmp_path / f"{number:03d}.jsonl").write_text("{}\n")
    manifest = Manifest.take(SourceConfig.model_validate({"name": "s", "paths": [str(tmp_path)]}))
    check_unchanged(manifest)
    (tmp_path / "650.jsonl").unlink()
    (tmp_path / "301.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"301\.jsonl has 2 bytes, 3 when"):
        check_unchanged(manifest)
    (tmp_path / "301.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"650\.jsonl is gone"):
        check_unchanged(manifest)
