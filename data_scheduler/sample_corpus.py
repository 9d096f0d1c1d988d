"""A small multi-source corpus of real text that needs no download: what every Python installation carries.

    write_sample_corpus(Path("corpus"))
    corpus/code/train-00000.jsonl.zst        standard-library modules
    corpus/prose/train-00000.jsonl.gz        their docstrings, a document a module, and the interpreter's help topics
    corpus/headers/train-00000.parquet       C headers and plain-text files of the installation, licences
    corpus/unicode/train-00000.jsonl.gz      character tables: code points, characters, names
    corpus/arithmetic/train-00000.jsonl      generated worked problems, as many as make 16 MB in all
    corpus/<source>/val-00000.*              about 4 % of each source's documents, held out

Each record is `{"text", "path", "id"}`; `path` is relative to the installation, never the machine's. Whether a
document is held out depends on a hash of its path alone, so the docstrings of a held-out module are held out with its
code. Order within a source is a hash of seed and path, so that every shard looks like the whole. The same interpreter,
seed and library versions give the same bytes.
"""

import ast
import gzip
import hashlib
import inspect
import itertools
import os
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from data_scheduler.sample_arithmetic import problems
from headrace.errors import DataError

TOTAL_BYTES = 16_000_000
"""Text the whole corpus holds at least; generated arithmetic makes up what the installation lacks."""
MIN_ARITHMETIC_BYTES = 2_000_000
SHARD_BYTES = 700_000
HELD_OUT_PERCENT = 4
_LARGEST_DOCUMENT = 400_000
# Where Python's own headers and texts come to less than this (Debian's python3 without its -dev package), the
# system's headers and licences are read as well.
_ENOUGH_HEADER_BYTES = 500_000


class Document(NamedTuple):
    path: str
    text: str


class SourceSummary(NamedTuple):
    """What was written for one source. `files`, `documents` and `bytes` (UTF-8 text) count both splits."""

    source: str
    suffix: str
    files: int
    documents: int
    val_documents: int
    bytes: int


def write_sample_corpus(out: Path, seed: int = 0) -> list[SourceSummary]:
    """Write the corpus below `out`, replacing the shards of an earlier one. Takes about 5 s, most of it parsing.

    Raises DataError when the installation carries no source code at all (a zipped or stripped standard library).
    """
    library = Path(sysconfig.get_path("stdlib"))
    modules = list(_modules(library))
    if not modules:
        raise DataError(
            f"no standard-library source below {library}; use a Python that is installed with its .py files"
        )
    sources: dict[str, tuple[str, list[Document]]] = {
        "code": ("jsonl.zst", modules),
        "prose": ("jsonl.gz", [*_docstrings(modules), *_help_topics()]),
        "headers": ("parquet", list(_headers(library, Path(sysconfig.get_path("include"))))),
        "unicode": ("jsonl.gz", list(_character_tables())),
    }
    found = sum(len(document.text.encode()) for _, documents in sources.values() for document in documents)
    wanted = max(MIN_ARITHMETIC_BYTES, TOTAL_BYTES - found)
    sources["arithmetic"] = ("jsonl", [Document(f"{i:06d}", text) for i, text in enumerate(problems(wanted, seed))])
    return [_write_source(out, name, suffix, documents, seed) for name, (suffix, documents) in sources.items()]


def is_held_out(path: str) -> bool:
    """Whether documents of this path belong to the validation split; a fixed property of the path."""
    return _rank("held-out", path) % 100 < HELD_OUT_PERCENT


def _rank(salt: str, path: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{salt}:{path}".encode(), digest_size=8).digest(), "big")


def _read(file: Path) -> str | None:
    """The file's text, or None where it is not UTF-8, too small to teach anything or too large for a shard."""
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text.replace("\r\n", "\n") if 200 <= len(text) <= _LARGEST_DOCUMENT else None


def _documents(root: Path, files: Iterable[Path], prefix: str = "") -> Iterator[Document]:
    for file in sorted(files):
        text = _read(file)
        if text is not None:
            yield Document(prefix + file.relative_to(root).as_posix(), text)


def _library_files(library: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files of the standard library proper, without what differs from one installation of it to the next.

    Tests are left out because distributions leave them out; installed packages because they are the user's; build data
    because it holds the machine's paths; character maps because they are tables, not code.
    """
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
    for folder, below, names in os.walk(library):
        below[:] = sorted(name for name in below if name not in skipped and not name.startswith("config-"))
        here = Path(folder)
        for name in sorted(names):
            if not name.endswith(tuple(suffixes)) or name.startswith("_sysconfigdata"):
                continue
            is_table = here == library / "encodings" and "charmap" in (here / name).read_text("utf-8", "replace")
            if not is_table and here / name != library / "pydoc_data" / "topics.py":
                yield here / name


def _modules(library: Path) -> Iterator[Document]:
    yield from _documents(library, _library_files(library, (".py",)))


def _docstrings(modules: Iterable[Document]) -> Iterator[Document]:
    """One document a module: its docstrings in file order, each under its qualified name."""
    for path, text in modules:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # lib2to3 carries files in older dialects
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        entries = list(_entries(tree, name))
        if sum(map(len, entries)) >= 200:
            yield Document(path, "\n\n".join(entries) + "\n")


def _entries(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node, clean=False)
        if doc and doc.strip():
            yield f"{name}\n{inspect.cleandoc(doc)}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):  # nine nodes in ten, and no definition inside
            continue
        inner = getattr(child, "name", None)
        is_definition = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _entries(child, f"{name}.{inner}" if is_definition else name)


def _help_topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])


def _headers(library: Path, include: Path) -> Iterator[Document]:
    texts = (".txt", ".rst", ".html", ".cfg", ".toml")
    documents = [
        *_documents(include, include.rglob("*.h") if include.is_dir() else (), "include/"),
        *_documents(library, _library_files(library, texts)),
    ]
    yield from documents
    size = sum(len(document.text) for document in documents)
    if size >= _ENOUGH_HEADER_BYTES:
        return
    system, licences = Path("/usr/include"), Path("/usr/share/common-licenses")
    folders = [system, system / "linux", *sorted(system.glob("*/sys")), *sorted(system.glob("*/bits"))]
    for document in itertools.chain(
        _documents(licences, (file for file in licences.glob("*") if file.is_file()), "licences/"),
        *(_documents(system, folder.glob("*.h"), "include/system/") for folder in folders),
    ):
        yield document
        size += len(document.text)
        if size >= _ENOUGH_HEADER_BYTES:
            return


def _character_tables() -> Iterator[Document]:
    """Every named character but the ideographs and syllables that are named by a rule; 64 code points a document."""
    for start in range(0x20, 0x20000, 64):
        rows = []
        for code in range(start, start + 64):
            character = chr(code)
            name = unicodedata.name(character, "")
            if name and not name.startswith(
                ("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")
            ):
                rows.append(f"U+{code:04X} {character} {name.lower()} ({unicodedata.category(character)})")
        if len(rows) >= 8:
            yield Document(f"{start:05X}", "\n".join(rows) + "\n")


def _write_source(out: Path, name: str, suffix: str, documents: Sequence[Document], seed: int) -> SourceSummary:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("train-*"), *folder.glob("val-*")]:
        stale.unlink()
    ordered = sorted(documents, key=lambda document: (_rank(f"order {seed}", document.path), document.path))
    held_out = [document for document in ordered if is_held_out(document.path)]
    if not held_out and len(ordered) > 1:
        # A source of a few documents may miss the 4 %; it still needs one to be evaluated on.
        held_out = [min(ordered, key=lambda document: _rank("held-out", document.path))]
    apart = {document.path for document in held_out}
    train = [document for document in ordered if document.path not in apart]
    files = _write_split(folder, "train", suffix, name, train) + _write_split(folder, "val", suffix, name, held_out)
    size = sum(len(document.text.encode()) for document in ordered)
    return SourceSummary(name, suffix, files, len(ordered), len(held_out), size)


def _write_split(folder: Path, split: str, suffix: str, source: str, documents: Sequence[Document]) -> int:
    """Write shards of about SHARD_BYTES of text; returns how many."""
    shards: list[list[dict[str, str]]] = []
    room = 0
    for path, text in documents:
        if room <= 0:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append({"text": text, "path": path, "id": f"{source}/{path}"})
        room -= len(text.encode())
    for index, records in enumerate(shards):
        _write_shard(folder / f"{split}-{index:05d}.{suffix}", suffix, records)
    return len(shards)


def _write_shard(file: Path, suffix: str, records: list[dict[str, str]]) -> None:
    if suffix == "parquet":
        table = pyarrow.Table.from_pylist(
            records, schema=pyarrow.schema([(key, pyarrow.string()) for key in records[0]])
        )
        pyarrow.parquet.write_table(table, file, row_group_size=16, compression="zstd", compression_level=3)
        return
    lines = b"".join(orjson.dumps(record) + b"\n" for record in records)
    if suffix == "jsonl.zst":
        lines = zstandard.ZstdCompressor(level=3).compress(lines)
    elif suffix == "jsonl.gz":
        lines = gzip.compress(lines, compresslevel=6, mtime=0)
    file.write_bytes(lines)
