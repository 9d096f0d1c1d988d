"""What a configuration's sources hold and how they will be cut, before a run begins; and their copies, ahead of it."""

import contextlib
import io
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

from data_scheduler.chunks import Chunk, chunk_target
from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.copies import TEXT_PER_BYTE
from data_scheduler.layout_index import LayoutIndex
from data_scheduler.manifest import Manifest
from data_scheduler.parts import PartReader
from data_scheduler.progress import Task
from data_scheduler.reading import UnitReader, column_layout
from data_scheduler.unit_cache import UnitCache


@dataclass
class SourceReport:
    """One source, as it would enter a run now."""

    source: str
    files: int
    bytes: int
    text_bytes: int
    """Text, estimated for compressed files."""
    documents: int | None
    """Rows, where the files say how many they hold; None: not known without reading them."""
    chunks: int
    chunk_bytes: int
    """Text a chunk is meant to hold."""
    chunks_per_lane: float
    large_units: int
    """Files and row groups that are read through a copy."""
    large_text_bytes: int
    problems: list[str] = field(default_factory=list)

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Large:
    """A unit that wants a copy, with all that a process needs to make it."""

    source: SourceConfig
    manifest: Manifest
    """Of the unit's file only."""
    chunk: Chunk


def index_sources(config: DataConfig) -> Iterator[tuple[SourceReport, list[_Large]]]:
    """A report of every source, and its units that want a copy. Raises ConfigError or DataError."""
    index = LayoutIndex(config.cache_folder() / "index.sqlite")
    for source in config.sources:
        manifest = Manifest.take(source, index)
        pieces = manifest.pieces(source)
        chunks = manifest.chunks(source, config.settled_chunk_bytes, config.lanes)
        large = [chunks[first] for first in chunks.firsts[:-1][chunks.copied].tolist()]
        known = len(manifest.row_groups) == len(manifest.files)
        report = SourceReport(
            source=source.name,
            files=len(manifest.files),
            bytes=sum(size for _, size in manifest.files),
            text_bytes=int(pieces.sizes.sum()),
            documents=sum(rows for layout in manifest.row_groups.values() for rows, _ in layout) if known else None,
            chunks=len(chunks),
            chunk_bytes=chunk_target(pieces, config.settled_chunk_bytes, config.lanes),
            chunks_per_lane=round(len(chunks) / config.lanes, 2),
            large_units=len(large),
            large_text_bytes=sum(chunk.size * chunk.parts for chunk in large),
        )
        report.problems += _problems(source, manifest, report, config)
        yield report, [_Large(source, _manifest_of(manifest, chunk.unit.path), chunk) for chunk in large]


def _problems(source: SourceConfig, manifest: Manifest, report: SourceReport, config: DataConfig) -> Iterator[str]:
    for path, layout in manifest.row_groups.items():
        if layout == [(1, 0)]:  # what `take` says of a file that it could not open
            try:
                column_layout(path, source.format)
            except (OSError, ValueError) as error:
                yield f"{path}: not readable: {str(error).splitlines()[0]}"
    if report.chunks < config.lanes:
        yield f"{report.chunks} chunks for {config.lanes} lanes: lanes without one in an epoch wait for the next"
    if report.documents is not None and report.documents < config.lanes:
        yield f"{report.documents} documents for {config.lanes} lanes; give it more data or lower data.lanes"
    needed = int(report.large_text_bytes / TEXT_PER_BYTE)
    if config.cache_max_bytes and needed > config.cache_max_bytes:
        yield (
            f"copies need about {needed:,} bytes, data.cache_max_bytes is {config.cache_max_bytes:,}; "
            "what does not fit is read slowly"
        )


def _manifest_of(manifest: Manifest, path: str) -> Manifest:
    layout = manifest.row_groups.get(path)
    return Manifest(manifest.source, [], {} if layout is None else {path: layout})


def make_copies(config: DataConfig, large: list[_Large]) -> list[tuple[str, str]]:
    """Make what copies are missing, in as many processes as there are cores; (source, problem) of those that failed."""
    problems: list[tuple[str, str]] = []
    data = config.model_dump(mode="json")
    total = sum(unit.chunk.size * unit.chunk.parts for unit in large)
    workers = max(1, min(len(large), os.cpu_count() or 1))
    # `spawn`: a forked child would inherit pyarrow's threads in whatever state they are.
    with (
        Task("copying large files", total) as task,
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
    ):
        waiting = {pool.submit(_make_copy, data, unit): unit for unit in large}
        for done in as_completed(waiting):
            unit = waiting[done]
            task.advance(unit.chunk.size * unit.chunk.parts)
            problems += [(unit.source.name, problem) for problem in done.result()]
    return problems


def _make_copy(data: dict[str, Any], unit: _Large) -> list[str]:
    config = DataConfig.model_validate(data)
    reader = PartReader(unit.source, unit.manifest, config, UnitReader(unit.source), UnitCache())
    said = io.StringIO()
    with contextlib.redirect_stderr(said):  # the parent shows the progress of all
        made = reader.make_copy(unit.chunk)
    if made:
        return []
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("headrace: ")]
    return lines or [f"{unit.chunk.unit.path}: could not be copied"]
