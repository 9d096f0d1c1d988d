"""JSON lines. An uncompressed file can be read by byte ranges: a range owns the lines that begin in it."""

from collections.abc import Iterable, Iterator
from typing import IO, Any

import orjson

from data_scheduler.blocks import Block
from data_scheduler.extract import Extractor
from data_scheduler.formats.compression import Codec, Damage, decoded
from data_scheduler.formats.records import Records, Unit

READ_BYTES = 1 << 20
TAIL_BYTES = 16 << 10
"""First read past a range for the rest of its last line, doubled while the line goes on."""
BOM = b"\xef\xbb\xbf"


def read(file: IO[bytes], unit: Unit, codec: Codec | None, extractor: Extractor) -> Records:
    """The records of a unit. Raises OSError."""
    records = Records()
    limit = extractor.max_bytes
    pieces = byte_range(file, unit.start, unit.stop, limit) if codec is None else decoded(file, codec)
    if unit.start == 0:
        pieces = _without_bom(pieces)
    rows: list[dict[str, Any] | str] = []
    problem = None
    try:
        for line in whole_lines(pieces, limit):
            if isinstance(line, int):
                rows.append(extractor.too_long(line))
            # A blank line is not a record: editors and `cat` leave them behind.
            elif line and not line.isspace():
                records.size += len(line)
                rows.append(parse(line))
                if extractor.is_plain and len(rows) >= 1024:
                    _add_plain(rows, extractor.text_key, records)  # frees the fields that nobody asked for
                    rows = []
    except Damage as damage:
        problem = str(damage)
    if extractor.is_plain:
        _add_plain(rows, extractor.text_key, records)
    else:
        extractor.add(rows, records)
    if problem is not None:
        records.reject(problem)
    return records


def read_blocks(blocks: Iterable[Block], extractor: Extractor) -> Records:
    """The records of blocks of whole lines; what is wrong with the stream is a reject after the lines of its block."""
    records = Records()
    rows: list[dict[str, Any] | str] = []
    for number, data, problem in blocks:
        records.blocks.append((len(rows), number))
        for line in views(data, len(BOM) if number == 0 and data.startswith(BOM) else 0):
            if len(line) > extractor.max_bytes:
                rows.append(extractor.too_long(len(line)))
                continue
            row = parse(line)
            if isinstance(row, str) and bytes(line).isspace():
                continue
            records.size += len(line)
            rows.append(row)
        if problem is not None:
            rows.append(problem)
    if extractor.is_plain:
        _add_plain(rows, extractor.text_key, records)
    else:
        extractor.add(rows, records)
    return records


def views(data: bytes, at: int = 0) -> Iterator[memoryview]:
    """The lines from byte `at` on that are not empty, without their newlines; splitting would copy all of the text."""
    whole = memoryview(data)
    while at < len(data):
        end = data.find(b"\n", at)
        if end < 0:
            end = len(data)
        if end > at:
            yield whole[at:end]
        at = end + 1


def parse(line: bytes | memoryview) -> dict[str, Any] | str:
    """The object in a line, or the reason why there is none."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not valid JSON: {error}"
    return value if isinstance(value, dict) else f"a {type(value).__name__}, not an object"


def whole_lines(pieces: Iterable[bytes], limit: int) -> Iterator[bytes | int]:
    """The lines of a stream without their newlines; of a line longer than `limit` bytes only a count of its bytes, at
    least `limit` + 1. When the stream raises Damage, the line it broke off in is dropped."""
    begun: list[bytes] = []
    length = 0
    for piece in pieces:
        first, *rest = piece.split(b"\n")
        length += len(first)
        if length <= limit:
            begun.append(first)
        else:
            begun = []
        if not rest:
            continue
        yield length if length > limit else b"".join(begun)
        *middle, last = rest
        for line in middle:
            yield len(line) if len(line) > limit else line
        begun, length = [last], len(last)
    if length:
        yield length if length > limit else b"".join(begun)


def byte_range(file: IO[bytes], start: int, stop: int, limit: int) -> Iterator[bytes]:
    """The lines that begin within [start, stop), in pieces; the last one to its end, or to a bit past `limit` bytes."""
    at = start
    if start > 0:
        # A line begins at `start` only if a newline stands right before it.
        at = start - 1
        file.seek(at)
        found = False
        while not found and (piece := file.read(min(READ_BYTES, stop - at))):
            at += len(piece)
            newline = piece.find(b"\n")
            found = newline >= 0
            piece = piece[newline + 1 :]
        if not found:
            return
        yield piece
        ended = not piece or piece.endswith(b"\n")
    else:
        ended = True
    while at < stop or stop < 0:
        piece = file.read(READ_BYTES if stop < 0 else min(READ_BYTES, stop - at))
        if not piece:
            return
        at += len(piece)
        ended = piece.endswith(b"\n")
        yield piece
    over, ahead = 0, TAIL_BYTES
    while not ended and over <= limit and (piece := file.read(ahead)):
        end = piece.find(b"\n")
        over += len(piece)
        ahead = min(2 * ahead, READ_BYTES)
        ended = end >= 0
        yield piece[: end + 1] if ended else piece


def _without_bom(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Some editors put U+FEFF at the beginning of a UTF-8 file."""
    for number, piece in enumerate(pieces):
        yield piece.removeprefix(BOM) if number == 0 else piece


def _add_plain(rows: list[dict[str, Any] | str], key: str, records: Records) -> None:
    """The usual case without the machinery of templates and filters: it costs 0.2 µs a record, that 2."""
    for row in rows:
        if isinstance(row, str):
            records.reject(row)
            continue
        text = row.get(key)
        if isinstance(text, str):
            records.documents.append(text)
        else:
            records.reject(f"field {key!r} is " + ("missing" if text is None else "not text"))
