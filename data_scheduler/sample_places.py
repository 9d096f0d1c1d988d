"""A few places of a source, read for what they say about all of it: evenly spaced, so the same in every run.

A plain `.jsonl` can be read from anywhere, a compressed one only from its beginning.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from data_scheduler.blocks import Block
from data_scheduler.formats import lines
from data_scheduler.formats.compression import CODECS, Damage, decoded
from data_scheduler.formats.records import Document, Unit
from data_scheduler.paths import file_kind
from data_scheduler.pieces import TEXT_PER_COMPRESSED_BYTE, Piece
from data_scheduler.reading import UnitReader

WIDEST_BYTES = 2 << 20
"""Where no line begins in a window, up to this much is looked through."""


def places_of(pieces: Sequence[Piece], number: int) -> dict[int, list[int]]:
    """`number` places, evenly spaced over the text of the pieces: place in `pieces` → bytes into that piece."""
    ends = list(accumulate(piece.size for piece in pieces))
    places: dict[int, list[int]] = {}
    for place in range(number):
        at = (2 * place + 1) * ends[-1] // (2 * number)
        found = bisect_right(ends, at)
        places.setdefault(found, []).append(at - (ends[found] - pieces[found].size))
    return places


def window(units: UnitReader, piece: Piece, offset: int, wide: int) -> tuple[list[Document], float]:
    """The documents whose lines begin in `wide` bytes of a plain file, or in more where there are none in these, and
    the bytes of these lines."""
    while True:
        start = max(0, min(offset, piece.size - wide))
        records = units.read(Unit(piece.unit.path, start, min(start + wide, piece.size)))
        documents = good(records.documents)
        if documents or wide >= min(WIDEST_BYTES, piece.size):
            return documents, records.size + len(records.documents)  # a newline each
        wide *= 8


def beginning(units: UnitReader, piece: Piece, limit: int) -> tuple[list[Document], float]:
    """The documents in the first `limit` bytes of a compressed file's text, and the bytes of the manifest they are."""
    path = piece.unit.path
    codec = CODECS[file_kind(path, units.config.format)[1] or ""]
    text = bytearray()
    stands_for = float(piece.size)
    try:
        with units.open(path) as file:
            for part in decoded(file, codec):
                text += part
                if len(text) >= limit:
                    end = text.rfind(b"\n") + 1
                    stands_for = file.tell() * TEXT_PER_COMPRESSED_BYTE * end / len(text)
                    del text[end:]
                    break
    except (OSError, Damage):
        pass  # what could be read is the sample; a run names what is wrong with the file
    return good(lines.read_blocks([Block(0, bytes(text))], units.extractor).documents), stands_for


def good(documents: Sequence[Document | None]) -> list[Document]:
    """The documents without the gaps of rejects."""
    return [document for document in documents if document is not None]
