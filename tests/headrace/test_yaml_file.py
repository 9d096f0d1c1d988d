"""Configuration files as people write them: what is read, and the one line when it cannot be."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.yaml_file import dump_yaml, parse_yaml, read_yaml

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_what_is_written_reads_back(data: Any) -> None:
    assert parse_yaml(dump_yaml(data)) == data


@pytest.mark.parametrize(
    "text", ["3e-4", "1e5", "04:00:00", "4:00", "2026-01-31", "no", "null", "0x1f", "1_000", "-", "a\x85b", "\u2028"]
)
def test_strings_that_look_like_something_else_come_back_as_strings(text: str) -> None:
    assert parse_yaml(dump_yaml({"name": text})) == {"name": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e5", 1e5), (".5", 0.5), ("7", 7), ("1_000", 1000), ("0x1f", 31), ("-3", -3), ("+3", 3),
        ("04:00:00", "04:00:00"), ("2026-13-45", "2026-13-45"), ("2026-01-31", "2026-01-31"), ("1.2.3", "1.2.3"),
        ("true", True), ("~", None),
    ],
)  # fmt: skip
def test_values_mean_what_they_look_like(text: str, value: object) -> None:
    got = parse_yaml(text)
    assert (type(got), got) == (type(value), value)


def test_merged_sections_may_be_overridden() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*a, *b], x: 4}\n"
    assert parse_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 4, "y": 2}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"run: {dir: x\nmodel: [", r"x.yaml:2:\d+: not valid YAML: "),
        (b"run: {dir: x}\nmodel: 1\nrun: {dir: y}\n", r"x.yaml:3:1: not valid YAML: the key 'run' stands here twice"),
        (b"run:\n  dir: a\n  dir: b\n", r"x.yaml:3:3: .*'dir' stands here twice"),
        (b'run:\n  dir: "caf\xe9"\n', r"x.yaml: not a text file in UTF-8 \(byte 17\)"),
        (b"run:\n\tdir: x\n", r"x.yaml:2:1: not valid YAML: found character '\\t'"),
        (b"run: *a\n", r"x.yaml:1:6: not valid YAML: found undefined alias"),
        (b"run: !!python/name:os.system\n", r"x.yaml:1:6: not valid YAML: could not determine a constructor"),
        (b"? [a, b]\n: 1\n", r"x.yaml:1:3: not valid YAML: found unhashable key"),
        (b"a: 1\n---\nb: 2\n", r"x.yaml:2:1: not valid YAML: but found another document"),
        (b"a: " + b"9" * 10_000, r"x.yaml: not valid YAML: Exceeds the limit"),
        (b"[" * 10_000, r"x.yaml: not valid YAML: nested too deeply"),
        (b"a: \x00", r"x.yaml: not valid YAML: unacceptable character"),
        (b"- a\n", r"x.yaml: expected a mapping with keys of: run, model"),
        (b"", r"x.yaml: expected a mapping with keys of: run, model"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path).mapping(["run", "model"])
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "none.yaml", "file not found"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "x.yaml", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfrun: 1\n")
    assert read_yaml(tmp_path / "x.yaml").data == {"run": 1}


def test_lines_of_values(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1\nb:\n  - c: 2\n    d: 3\n  - e: 4\n")
    file = read_yaml(tmp_path / "x.yaml")
    for location, line in (((), 1), (("b",), 2), (("b", 0, "d"), 4), (("b", 1, "e"), 5), (("b", 1, "none"), 5)):
        assert file.line(location) == line
