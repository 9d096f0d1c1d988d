"""Bad JSON lines and CSV, in every compression: named, counted, and the lines around them are read."""

import json
from pathlib import Path

import pytest
from read_records import PACK, read, rejects, texts

# -- JSON lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b'{"text": "\xff\xfe"}', "not valid JSON"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b'{"text": "\x00"}', "not valid JSON"),
        (b"\x00" * 50, "not valid JSON"),
        (b'{"text": "a", "n": NaN}', "not valid JSON"),
        (b'{"text": "a", "n": -Infinity}', "not valid JSON"),
        (b'{"text": "a", "n": ' + b"[" * 1200 + b"]" * 1200 + b"}", "longer than"),
        (b'{"text": "a", "n": ' + b"[" * 1100, "not valid JSON"),
        (b'{"text": null}', "'text' is missing"),
        (b'{"body": "a"}', "'text' is missing"),
        (b'{"text": 5}', "'text' is not text"),
        (b'{"text": 123456789012345678901234567890}', "'text' is not text"),
        (b'{"text": ["a"]}', "'text' is not text"),
        (b'"text"', "a str, not an object"),
        (b"null", "a NoneType, not an object"),
        ('{"text": "a"}'.encode("utf-16"), "not valid JSON"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "longer than max_document_bytes=1500"),
    ],
)
def test_a_bad_line_is_one_reject_between_its_neighbours(tmp_path: Path, suffix: str, line: bytes, reason: str) -> None:
    line = line.replace(b"\n", b"")
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n'))
    for where in (None, "text != 'nothing'"):
        records = read(path, max_document_bytes=1500, where=where)
        assert texts(records) == ["before", "after"]
        if where and "missing" in reason:  # as in SQL, a comparison with a missing value does not hold
            assert (records.filtered, rejects(records)) == (1, [])
            continue
        ((number, told),) = rejects(records)
        assert number == 1
        assert reason in told or where  # with a filter a field of another kind is rejected for that


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n\n", []),
        (b'\xef\xbb\xbf{"text": "byte order mark"}\n', ["byte order mark"]),
        (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'{"text": "no newline"}', ["no newline"]),
        (b'{"text": "first", "text": "last"}\n', ["last"]),
        (b'{"text": "", "n": 1e400}\n', None),
        (b'{"text": "\\u0000 and \\ud83d\\ude00"}\n', ["\0 and 😀"]),
        (b'{"text": "a", "n": 123456789012345678901234567890}\n', ["a"]),
        (b'{"text": "a", "n": ' + b"[" * 900 + b"]" * 900 + b"}\n", ["a"]),
    ],
)
def test_odd_but_sound_lines_are_read(tmp_path: Path, suffix: str, data: bytes, expected: list[str] | None) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](data))
    records = read(path)
    if expected is None:  # JSON that says so may be refused or read, but not lost
        assert len(texts(records)) + len(rejects(records)) == 1
    else:
        assert (texts(records), rejects(records)) == (expected, [])


def test_numbers_that_no_double_holds_do_not_slip_into_a_text(tmp_path: Path) -> None:
    rows = [
        b'{"text": "a", "n": 9007199254740993}',
        b'{"text": "b", "n": 123456789012345678901}',
        b'{"text": "c", "n": 1.5}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows))  # fmt: skip
    records = read(tmp_path / "x.jsonl", template="{n}")
    assert texts(records) == ["9007199254740993", "1.5"]
    assert "past 64 bits" in records.rejects[0].reason
    assert texts(read(tmp_path / "x.jsonl", where="n > 2")) == ["a", "b"]


def test_a_filter_that_fails_on_one_row_rejects_that_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 6, "m": 2}, {"text": "b", "n": 6, "m": 0}, {"text": "c", "n": 1, "m": 2}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = read(tmp_path / "x.jsonl", where="n / m > 2")
    assert texts(records) == ["a"]
    assert records.filtered == 1
    assert rejects(records) == [(1, "where: divide by zero")]


# -- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_oddities(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,text\r\n1,fine\r\n2,too,many\r\n3\r\n4,\xff\xfe\r\n5,\xff,many\r\n6,007\r\n7,NA\r\n8,\r\n"
        b"9,nul \0 byte\r\n"
    )
    records = read(path)
    assert texts(records) == ["fine", "007", "NA", "", "nul \0 byte"]
    assert [reason for _, reason in rejects(records)] == [
        "text is not valid UTF-8", "3 fields, not 2", "1 fields, not 2", "3 fields, not 2",
    ]  # fmt: skip
    assert texts(read(path, where="id > 5")) == ["007", "NA", "", "nul \0 byte"]
    path.write_bytes(b"text\n123\n456\n")
    assert texts(read(path)) == ["123", "456"]
    path.write_bytes(b'text\n"never closed\nrow\n')
    assert len(texts(read(path))) + len(rejects(read(path))) == 1
    path.write_bytes(b"text,text\na,b\n")
    assert rejects(read(path)) == [(0, "column 'text' is there 2 times")]
    path.write_bytes(b"text" + b",x" * 5000 + b"\n" + b"a" + b"," * 5000)
    assert rejects(read(path)) == [(0, "the header has 5001 columns, more than 4096")]
    path.write_bytes(b"text\n")
    assert (texts(read(path)), rejects(read(path))) == ([], [])
