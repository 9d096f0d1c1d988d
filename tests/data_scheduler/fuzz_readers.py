"""Damaged files of every format and compression through the readers.

    python tests/data_scheduler/fuzz_readers.py --inputs 100000 --seed 0

A good file is mutated (bits flipped, cut, spliced, doubled, magic bytes and lengths put in) and read as a run
reads it. Whatever it holds: no exception but HeadraceError, no hang, no crash of the libraries below, no more than
MEMORY_BYTES, and documents + rejects + filtered = records. Input n of a seed is always the same, so a failure is made
again by `--first n --inputs 1`.

The inputs run in forked children, so that a crash is seen: the child keeps the number it is at in shared memory.
"""

import argparse
import bz2
import faulthandler
import gzip
import json
import lzma
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import zstandard

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from token_files import write_ds, write_megatron

from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Records, Unit
from data_scheduler.reading import UnitReader, whole_file
from headrace.errors import HeadraceError

CPU_SECONDS_PER_INPUT = 20
WALL_SECONDS_PER_INPUT = 600
"""A machine that is busy with other things is no hang; a reader that waits for ever is."""
MEMORY_BYTES = 4 << 30
"""Address space of a child; the libraries alone map 2 GB."""
INPUTS_PER_CHILD = 1000
VOCABULARY = 1000
ROWS = [
    {
        "text": f"water wheel {number} " + "mühle 水 " * (number % 7),
        "n": number,
        "meta": {"lang": "de" if number % 2 else "en"},
    }
    for number in range(40)
]
MAGIC = [
    b"PAR1", b"ARROW1\x00\x00", b"\xff\xff\xff\xff", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh9", b"\xfd7zXZ\x00",
    b"\x93NUMPY", b"MMIDIDX\x00\x00", b"WARC/1.0\r\n", b"\xef\xbb\xbf", b"\x00" * 8, b"\n", b'"', b"{", b"[" * 2000,
    b"\\ud800", b"\r\n\r\n", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"1e999", b"-", b'{"text": null}\n',
    b'{"text": "a"}\n' * 9, b"\x80", b"Content-Length: 99999999999\r\n",
]  # fmt: skip
SETTINGS = [
    {},
    {"where": "n > 3 and meta.lang == 'de'"},
    {"template": "{n}: {text}"},
    {"text_key": "meta.lang"},
    {"max_document_bytes": 60},
]


class Case:
    """A good file, and those beside it, by suffix."""

    def __init__(self, name: str, files: dict[str, bytes], format: str = "auto") -> None:
        self.name, self.files, self.format = name, files, format


def cases(folder: Path) -> list[Case]:
    """A good file of every format and compression."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    table = pa.Table.from_pylist(ROWS)
    flat = table.select(["text", "n"])
    pa_csv.write_csv(flat, folder / "x.csv")
    csv = (folder / "x.csv").read_bytes()
    text = " ".join(str(row["text"]) for row in ROWS).encode()
    ids = [[1 + byte for byte in str(row["text"]).encode()] + [0] for row in ROWS]
    pack: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": lambda data: gzip.compress(data[:500], mtime=0) + gzip.compress(data[500:], mtime=0),
        ".zst": lambda data: zstandard.compress(data[:500]) + zstandard.compress(data[500:]),
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    found = [
        Case(f"x{stem}{suffix}", {"": pack[suffix](data)})
        for stem, data in ((".jsonl", lines), (".csv", csv), (".txt", text))
        for suffix in pack
    ]
    for compression in ("none", "snappy", "gzip", "zstd"):
        for checksum in (False, True):
            pq.write_table(
                table, folder / "x.parquet", row_group_size=15, compression=compression, write_page_checksum=checksum
            )
            found.append(Case("x.parquet", {"": (folder / "x.parquet").read_bytes()}))
    for compression in (None, "lz4", "zstd"):
        for make in (pa.ipc.new_file, pa.ipc.new_stream):
            options = pa.ipc.IpcWriteOptions(compression=compression)
            with make(folder / "x.arrow", table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=15)
            found.append(Case("x.arrow", {"": (folder / "x.arrow").read_bytes()}))
    dictionary = pa.table({"text": pa.array(["a", "b", "a"] * 9).dictionary_encode(), "n": list(range(27))})
    with pa.ipc.new_file(folder / "d.arrow", dictionary.schema) as writer:
        writer.write_table(dictionary)
    found.append(Case("d.arrow", {"": (folder / "d.arrow").read_bytes()}))
    np.save(folder / "x.npy", np.concatenate([np.array(document, np.uint16) for document in ids]))
    found.append(Case("x.npy", {"": (folder / "x.npy").read_bytes()}))
    write_megatron(folder / "x", ids)
    found.append(Case("x.bin", {"": (folder / "x.bin").read_bytes(), ".idx": (folder / "x.idx").read_bytes()}))
    for metadata in (True, False):
        write_ds(folder / "x.ds", ids, 2, metadata)
        names = ["", ".index", ".metadata"] if metadata else ["", ".index"]
        found.append(Case("x.ds", {name: (folder / f"x.ds{name}").read_bytes() for name in names}))
    return found + _datatrove_cases(lines)


def _datatrove_cases(lines: bytes) -> list[Case]:
    try:
        import cchardet  # noqa: F401
        import datatrove.pipeline.readers  # noqa: F401
        import magic  # noqa: F401
        from loguru import logger
        from test_datatrove import warc
    except ImportError:
        return []
    logger.remove()
    found = [Case("x.warc.gz", {"": warc()}), Case("x.warc", {"": warc(gzip=False)})]
    return [*found, Case("x.jsonl.gz", {"": gzip.compress(lines, mtime=0)}, "datatrove:jsonl")]


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """`data` with one to four injuries."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = max(1, len(found))
        at, length = rng.randrange(size), min(rng.randrange(1, 1 + rng.choice((4, 64, size))), size)
        match rng.randrange(9):
            case 0 | 1:
                for _ in range(rng.choice((1, 3, 20))):
                    if found:
                        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
            case 2:
                del found[at:]
            case 3:
                del found[at : at + length]
            case 4:
                found[at:at] = found[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                begin = rng.randrange(max(1, len(other)))
                found[at:at] = other[begin : begin + length]
            case 6:
                found[at:at] = rng.choice(MAGIC)
            case 7:  # lengths and offsets
                number = rng.choice(
                    (0, 1, -1, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, len(found), rng.getrandbits(63))
                )
                packed = struct.pack("<q", number)[: rng.choice((1, 2, 4, 8))]
                found[at : at + len(packed)] = packed
            case 8:
                found[at : at + length] = rng.choice((b"\x00", b"\xff", b" ")) * length
    return bytes(found[: 4 << 20])


def check(records: Records) -> None:
    """What holds for everything a reader gives."""
    documents = records.documents
    good = [document for document in documents if document is not None]
    assert len(documents) == len(good) + len(records.rejects) + records.filtered
    assert all(documents[reject.record] is None and reject.reason for reject in records.rejects)
    assert len({reject.record for reject in records.rejects}) == len(records.rejects)
    assert all("\n" not in reject.reason for reject in records.rejects), records.rejects
    for document in good:
        if isinstance(document, str):
            document.encode()
        else:
            assert document.dtype in (np.uint16, np.uint32)
            assert document.ndim == 1
            assert not len(document) or int(document.max()) < VOCABULARY


def run_input(number: int, seed: int, known: list[Case], folder: Path) -> str:
    """Make input `number`, read it, and say how it ended: `read`, `rejects` or `error`."""
    rng = random.Random(f"{seed}-{number}")
    case, other = rng.choice(known), rng.choice(known)
    files = dict(case.files)
    hurt = rng.choice(list(files))
    files[hurt] = mutate(rng, files[hurt], other.files[""])
    path = folder / case.name
    for suffix, data in files.items():
        (path.with_suffix(".idx") if suffix == ".idx" else Path(f"{path}{suffix}")).write_bytes(data)
    if ".metadata" not in files:
        Path(f"{path}.metadata").unlink(missing_ok=True)
    settings = rng.choice(SETTINGS)
    config = {"name": "x", "paths": [str(path)], "format": case.format, **settings}
    reader = UnitReader(SourceConfig.model_validate(config), eos_id=0, vocab_size=VOCABULARY)
    try:
        units = whole_file(str(path), case.format)
    except (OSError, ValueError):
        units = [Unit(str(path), 0, 1)]  # as `Manifest.take` does
    if case.name == "x.jsonl" and rng.random() < 0.5:
        size = path.stat().st_size
        cut = rng.randrange(1, size) if size > 1 else size
        units = [Unit(str(path), 0, cut), Unit(str(path), cut, size)] if size else []
    rejects = 0
    try:
        for unit in units[:50]:
            records = reader.read(unit)
            check(records)
            rejects += len(records.rejects)
    except HeadraceError:
        return "error"
    return "rejects" if rejects else "read"


def run_child(first: int, stop: int, seed: int, known: list[Case], folder: Path, at: mmap.mmap) -> None:
    """Inputs [first, stop); leaves the process. `at` holds the number being read and counts of how inputs ended."""
    try:
        _read_inputs(first, stop, seed, known, folder, at)
    except BaseException:
        traceback.print_exc()
        os._exit(3)  # whatever it was: the caller's code must not go on in two processes
    os._exit(0)


def _read_inputs(first: int, stop: int, seed: int, known: list[Case], folder: Path, at: mmap.mmap) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()  # by the process forked from
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
    ends: Counter[str] = Counter()
    for number in range(first, stop):
        at[:8] = struct.pack("<q", number)
        faulthandler.dump_traceback_later(WALL_SECONDS_PER_INPUT, exit=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_PER_INPUT)  # its signal ends the process
        ends[run_input(number, seed, known, folder)] += 1
        at[8:32] = struct.pack("<3q", ends["read"], ends["rejects"], ends["error"])


def fuzz(inputs: int, seed: int, first: int = 0) -> tuple[Counter[str], list[int]]:
    """(how the inputs ended, numbers of those that failed)."""
    failed: list[int] = []
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place)
        known = cases(folder)
        number = first
        while number < first + inputs:
            at = mmap.mmap(-1, 32)
            stop = min(number + INPUTS_PER_CHILD, first + inputs)
            child = os.fork()
            if child == 0:
                run_child(number, stop, seed, known, folder, at)
            _, status = os.waitpid(child, 0)
            for end, count in zip(("read", "rejects", "error"), struct.unpack("<3q", at[8:32]), strict=True):
                ends[end] += count
            if status:
                broken = struct.unpack("<q", at[:8])[0]
                failed.append(broken)
                how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
                print(f"input {broken} of seed {seed} failed ({how})", file=sys.stderr, flush=True)
                stop = broken + 1
            number = stop
    return ends, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    options = parser.parse_args()
    ends, failed = fuzz(options.inputs, options.seed, options.first)
    counts = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"{options.inputs} inputs, seed {options.seed}: {counts}; {len(failed)} failed {failed[:20]}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
