"""Sources with a number in every record, split into bands, and what is read of them."""

import functools
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import zstandard
from small_corpus import make_documents

from data_scheduler import DataConfig
from data_scheduler.band_edges import measure
from data_scheduler.bands import split
from data_scheduler.config import SourceConfig
from data_scheduler.encoder import load_encoder
from data_scheduler.manifest import Manifest
from data_scheduler.source import SourceReader
from data_scheduler.unit_cache import UnitCache

Make = Callable[..., DataConfig]
Row = dict[str, Any]


def rows_of(count: int, seed: int = 0, values: Callable[[random.Random], Any] = random.Random.random) -> list[Row]:
    rng = random.Random(seed)
    return [{"text": text, "q": values(rng)} for text in make_documents(f"d{seed}", count, seed)]


def lines(rows: list[Any]) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def write(folder: Path, name: str, rows: list[Row]) -> str:
    """The rows as a file of the kind that `name` says."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=max(1, len(rows) // 3))
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(1, len(rows) // 3))
    elif name.endswith(".csv"):
        path.write_text("text,q\n" + "".join(f'"{row["text"]}",{row["q"]!r}\n' for row in rows))
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        path.write_bytes(pack(lines(rows)))
    return str(path)


def source(paths: list[str], **changes: Any) -> SourceConfig:
    given = {"name": "s", "paths": paths, "bands": {"by": "q", "count": 3}, **changes}
    return SourceConfig.model_validate(given)


def bands_of_source(config: SourceConfig) -> list[SourceConfig]:
    return list(split(config, measure(config, Manifest.take(config))))


encoder_of = functools.cache(load_encoder)


def read_all(config: SourceConfig, data: DataConfig) -> SourceReader:
    """A reader that has read every chunk once; its documents in `found`."""
    reader = SourceReader(config, Manifest.take(config), data, encoder_of(data.tokenizer), UnitCache())
    found = [reader.records(chunk)[0].documents for chunk in range(len(reader.chunks))]
    reader.found = [text for part in found for text in part if text is not None]  # type: ignore[attr-defined]
    return reader
