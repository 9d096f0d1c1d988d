"""A source's files, cut into chunks: what is dealt to lanes.

The manifest is taken once, when the source enters the run, and journaled; a resumed run reads it from there, so files
that appear later cannot change the order of what was there before.

A *chunk* is a unit of a file (see `reading`), or, when a source is too small to give every lane a unit, one of several
equal parts of a unit: part p of n holds the records p, p+n, p+2n, …
"""

import itertools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Unit
from data_scheduler.paths import expand, file_kind, is_url
from data_scheduler.reading import column_layout, layout_units
from headrace.errors import DataError

TEXT_PER_COMPRESSED_BYTE = 4
"""Guess of the text behind a compressed byte (3.2 to 4.6 on English and code at common levels); only balances lanes."""
MIN_CHUNK_BYTES = 1 << 10


class Chunk(NamedTuple):
    """Records part, part+parts, … of a unit."""

    unit: Unit
    part: int
    parts: int
    size: int
    """Bytes of text, estimated for compressed files; only used to balance lanes."""


@dataclass(frozen=True)
class Manifest:
    """The files of one source as they were when it entered the run."""

    source: str
    files: list[tuple[str, int]]
    """(path, bytes), sorted by path."""
    row_groups: dict[str, list[tuple[int, int]]]
    """Files with parts of their own: (records, bytes) of each row group, record batch or stretch of documents."""

    @staticmethod
    def take(config: SourceConfig) -> "Manifest":
        """Look at the source's files now. Raises ConfigError when there are none, DataError when all are empty."""
        files = expand(config.paths, f"source {config.name!r}", config.format)
        if not any(size for _, size in files):
            raise DataError(f"source {config.name!r}: all {len(files)} files are empty ({files[0][0]}, …)")
        row_groups: dict[str, list[tuple[int, int]]] = {}
        for path, _ in files:
            try:
                layout = column_layout(path, config.format)
            except (OSError, ValueError) as error:
                if config.on_error == "stop":
                    raise DataError(f"source {config.name!r}: {path}: not readable: {error}") from None
                # One unit that will be rejected when it is read, so that the loss is counted where it belongs.
                layout = [(1, 0)]
            if layout is not None:
                row_groups[path] = layout
        return Manifest(config.name, files, row_groups)

    def to_data(self) -> dict[str, Any]:
        """The manifest as journaled."""
        return {"source": self.source, "files": self.files, "row_groups": self.row_groups}

    @staticmethod
    def from_data(data: dict[str, Any]) -> "Manifest":
        """The manifest of a journal event."""
        groups = {path: [(rows, size) for rows, size in layout] for path, layout in data["row_groups"].items()}
        return Manifest(data["source"], [(path, size) for path, size in data["files"]], groups)

    def chunks(self, config: SourceConfig, chunk_bytes: int, lanes: int) -> list[Chunk]:
        """The chunks of the source, in file order; a pure function of the manifest and the arguments.

        Chunks are `chunk_bytes` of text where a file can be cut there, smaller when the source would otherwise not give
        every lane two.
        """
        units = [unit for path, size in self.files for unit in self._units(path, size, config)]
        total = sum(size for _, size, _ in units)
        target = max(MIN_CHUNK_BYTES, min(chunk_bytes, total // (2 * lanes)))
        chunks: list[Chunk] = []
        for unit, size, divisible in units:
            pieces = max(1, -(-size // target))
            if divisible:
                edges = [size * piece // pieces for piece in range(pieces + 1)]
                chunks += [
                    Chunk(Unit(unit.path, start, stop), 0, 1, stop - start) for start, stop in itertools.pairwise(edges)
                ]
            else:
                chunks += [Chunk(unit, part, pieces, size // pieces) for part in range(pieces)]
        return chunks

    def _units(self, path: str, size: int, config: SourceConfig) -> list[tuple[Unit, int, bool]]:
        """(unit, bytes of text, whether byte ranges of it can be read alone)."""
        if size == 0:
            return []
        kind, compression = file_kind(path, config.format)
        if path in self.row_groups:
            layout = self.row_groups[path]
            units = layout_units(path, config.format, layout)
            return [(unit, max(1, text), False) for unit, (_, text) in zip(units, layout, strict=True)]
        if compression is not None:
            return [(Unit(path, 0, -1), size * TEXT_PER_COMPRESSED_BYTE, False)]
        return [(Unit(path, 0, -1), size, kind == "jsonl")]


def check_unchanged(manifest: Manifest) -> None:
    """Raise DataError when a local file of the manifest is gone or has another size than the journal says."""
    for path, size in manifest.files:
        if is_url(path):
            continue
        try:
            now = os.path.getsize(path)
        except FileNotFoundError:
            raise DataError(f"source {manifest.source!r}: {path} is gone; the run's journal needs it") from None
        if now != size:
            raise DataError(
                f"source {manifest.source!r}: {path} has {now} bytes, {size} when it entered the run; "
                "put the old file back, or start a new run folder"
            )
