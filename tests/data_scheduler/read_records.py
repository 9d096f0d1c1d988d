"""Reads a file of any format as a source would, and writes files in which something is wrong."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_readers
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Records, Unit
from data_scheduler.reading import UnitReader, whole_file

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip
COMPRESSED = [suffix for suffix in PACK if suffix]


def read(path: Path, **config: Any) -> Records:
    """All units of a file as one."""
    source = SourceConfig.model_validate({"name": "x", "paths": [str(path)], **config})
    reader = UnitReader(source, eos_id=0, vocab_size=1000)
    try:
        units = whole_file(str(path), source.format)
    except (OSError, ValueError):
        units = [Unit(str(path), 0, 1)]
    found = Records()
    for unit in units:
        records = reader.read(unit)
        fuzz_readers.check(records)
        found.rejects += [reject._replace(record=reject.record + len(found.documents)) for reject in records.rejects]
        found.documents += records.documents
        found.filtered += records.filtered
    return found


def texts(records: Records) -> list[Any]:
    good = [document for document in records.documents if document is not None]
    return [document if isinstance(document, str) else document.tolist() for document in good]


def rejects(records: Records) -> list[tuple[int, str]]:
    return [(reject.record, reject.reason) for reject in records.rejects]


def write_columns(path: Path, table: pa.Table, rows: int = 2) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(
            table, path, row_group_size=rows, write_page_checksum=True, use_dictionary=False, compression="none"
        )
    else:
        kind = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
        with kind(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path
