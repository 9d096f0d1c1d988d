"""Reading one chunk: the part of its unit, from where that is cheapest. The records are the same from everywhere.

    whole unit            the format reads it
    blocks of lines       a copy  ·  the text held in memory  ·  the stream, from its beginning
    rows of a row group   a copy  ·  the row group held in memory
    every n-th record     the unit held in memory

A copy is used for large units (`Chunk.copied`), and for text that turns out larger than it was taken for.
"""

import contextlib
import itertools
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from data_scheduler.bands import base_name
from data_scheduler.blocks import Block, cut
from data_scheduler.chunks import Chunk
from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.copies import CopyFolder
from data_scheduler.copy_file import Copy, DamagedCopy
from data_scheduler.formats import columns, lines, row_parts
from data_scheduler.formats.compression import CODECS, decoded
from data_scheduler.formats.records import Records, Unit
from data_scheduler.manifest import Manifest
from data_scheduler.paths import file_kind, is_url, open_binary
from data_scheduler.reading import UnitReader, unreadable
from data_scheduler.remote import url_stamp
from data_scheduler.unit_cache import UnitCache

ENDS_BYTES = 1 << 16
"""Bytes at each end of a file whose checksum tells it from another of the same size and time."""


@dataclass
class HeldText:
    """A compressed file's text in memory."""

    blocks: dict[int, list[Block]]
    """By the part they belong to: looking through all would cost more than reading them, of 5 KB blocks."""
    size: int


class _Unreadable(Exception):
    """The file itself, not its copy, cannot be read."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


class _TooLarge(Exception):
    """The text is more than should be held in memory."""


class PartReader:
    """Reads the chunks of one source."""

    def __init__(
        self, config: SourceConfig, manifest: Manifest, data: DataConfig, units: UnitReader, cache: UnitCache
    ) -> None:
        self._config, self._units, self._cache = config, units, cache
        self._row_groups = manifest.row_groups
        self._copies = CopyFolder(data.cache_folder() / "copies", data.cache_max_bytes)
        self._keys: dict[str, str] = {}
        self._larger: set[str] = set()
        """Files whose text turned out larger than it was taken for."""
        self._undecodable: set[Unit] = set()
        """Row groups that cannot be copied because they cannot be read."""

    def read(self, chunk: Chunk) -> Records:
        """The chunk's own records. A unit that cannot be read gives one reject that says so."""
        records, band = self._read(chunk), self._units.extractor.band
        return records if band is None or band.takes_strays else records.without_strays()

    def _read(self, chunk: Chunk) -> Records:
        unit, extractor = chunk.unit, self._units.extractor
        if chunk.parts == 1:
            return self._units.read(unit)
        if chunk.block:
            try:
                return lines.read_blocks(self._line_blocks(chunk), extractor)
            except _Unreadable as error:
                return unreadable(error.cause)
        layout = self._row_groups.get(unit.path)
        if layout is not None and chunk.copied:
            # What cannot be copied because it cannot be read is rejected below, where small units are.
            with contextlib.suppress(_Unreadable):
                packed = self._copied(chunk)
                if packed is not None:
                    return row_parts.read(packed[0].data, extractor)
        whole = self._cache.get((self._config.name, unit), lambda: self._units.read(unit))
        if layout is not None:
            return whole.only(chunk.rows(len(whole.documents)))
        return whole.only(range(chunk.part, len(whole.documents), chunk.parts))

    def make_copy(self, chunk: Chunk) -> bool:
        """Make the copy of a chunk's unit unless there is one; whether there is one now."""
        try:
            return self._open_copy(chunk) is not None
        except _Unreadable:
            return False  # the run will name it when it reads it

    def _line_blocks(self, chunk: Chunk) -> list[Block]:
        path = chunk.unit.path
        if not chunk.copied and path not in self._larger:
            try:
                held = self._cache.get((base_name(self._config), path, chunk.block), lambda: self._held(chunk))
                return held.blocks.get(chunk.part, [])
            except _TooLarge:
                self._larger.add(path)
        copied = self._copied(chunk)
        if copied is not None:
            return copied
        return [block for block in self._stream(chunk) if block.number % chunk.parts == chunk.part]

    def _held(self, chunk: Chunk) -> HeldText:
        held = HeldText({}, 0)
        for block in self._stream(chunk):
            held.blocks.setdefault(block.number % chunk.parts, []).append(block)
            held.size += len(block.data)
            if held.size > self._cache.budget // 2:
                raise _TooLarge
        return held

    def _copied(self, chunk: Chunk) -> list[Block] | None:
        """The chunk's blocks from the copy of its unit; None when there can be no copy."""
        while copy := self._open_copy(chunk):
            try:
                return list(copy.blocks(chunk.part, chunk.parts))
            except DamagedCopy as damage:
                self._copies.discard(copy, str(damage), chunk.unit.path)
        return None

    def _open_copy(self, chunk: Chunk) -> Copy | None:
        if chunk.unit in self._undecodable:
            return None
        what = chunk.unit.path if chunk.block else f"{chunk.unit.path}, row group {chunk.unit.start}"
        make = self._stream if chunk.block else self._rows
        return self._copies.open(self._key(chunk), lambda: make(chunk), chunk.size * chunk.parts, what)

    def _stream(self, chunk: Chunk) -> Iterator[Block]:
        """All blocks of a compressed file. Raises _Unreadable."""
        codec = CODECS[file_kind(chunk.unit.path, self._config.format)[1] or ""]
        try:
            with self._units.open(chunk.unit.path) as file:
                yield from cut(decoded(file, codec), chunk.block, self._config.max_document_bytes)
        except OSError as error:
            raise _Unreadable(error) from None

    def _rows(self, chunk: Chunk) -> Iterator[Block]:
        """All parts of a row group. Raises _Unreadable."""
        unit = chunk.unit
        total = self._row_groups[unit.path][unit.start][0]
        kind, _ = file_kind(unit.path, self._config.format)
        lengths = [len(chunk._replace(part=part).rows(total)) for part in range(chunk.parts)]
        try:
            with self._units.open(unit.path) as file:
                packed = row_parts.pack(file, unit, kind, self._units.extractor, lengths)
                yield from itertools.starmap(Block, enumerate(packed))
        except (*columns.BROKEN, RuntimeError) as error:
            self._undecodable.add(unit)
            raise _Unreadable(OSError(str(error))) from None

    def _key(self, chunk: Chunk) -> str:
        """What a copy is known by: the file as it is now, and how it is cut. Raises _Unreadable."""
        unit = chunk.unit
        try:
            identity = self.identity(unit.path)
        except OSError as error:
            raise _Unreadable(error) from None
        how = (
            [chunk.block, self._config.max_document_bytes]
            if chunk.block
            else [unit.start, chunk.parts, self._units.extractor.columns]
        )
        return f"{identity} {how}"

    def identity(self, path: str) -> str:
        """What tells the file from itself after a change; looked at once. Raises OSError."""
        if path not in self._keys:
            self._keys[path] = _identity(path)
        return self._keys[path]


def _identity(path: str) -> str:
    """Path, size, time or tag, and a checksum of both ends of a file. Raises OSError."""
    stamp, name = (url_stamp(path), path) if is_url(path) else (str(os.stat(path).st_mtime_ns), os.path.abspath(path))
    with open_binary(path) as file:
        ends = zlib.crc32(file.read(ENDS_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ENDS_BYTES))
        ends = zlib.crc32(file.read(), ends)
    return f"{name} {size} {stamp} {ends:08x}"
