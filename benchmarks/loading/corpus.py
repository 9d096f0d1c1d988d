"""The text that every arm reads: what the machine carries, eight kinds of it, the same bytes in every format.

    <folder>/main/<kind>/00000.jsonl .jsonl.zst .parquet     what is measured
    <folder>/warm/<kind>/…                                   other documents, for the warm-up; 8 % of the text
    <folder>/main/tokens/<kind>.npy + .ends.npy              the same documents as token ids (see `write_tokens`)
    <folder>/tokenizer/tokenizer.json                        32,000 byte-level tokens, Llama 3's word pattern
    <folder>/corpus.json                                     what was found; written last

No document is there twice, byte for byte. Where a machine carries too little text, the rest is made from copies in
which the letters of every eighth word are shuffled: most words then meet a tokenizer's cache as they would in other
real text, and every eighth does not, which is more misses than real text has. `distinct_bytes` says how much is real.
"""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow
import pyarrow.parquet
import zstandard
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VERSION = 1
VOCAB_SIZE = 32_000
TRAINING_BYTES = 16_000_000
WARM_PERCENT = 8
SHARD_BYTES = 8_000_000
ROW_GROUP_BYTES = 4_000_000
SMALLEST, LARGEST = 200, 400_000  # characters of a document
PIECE = 2_000  # characters of a document cut from a module
FEWEST = 2 * -(-100 // WARM_PERCENT)  # documents of a kind, so that its warm-up has at least two
# Llama 3's: letters with the sign before them, up to three digits, punctuation with the newlines after it.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
# (kind, share of the bytes, suffixes). A kind that comes up short leaves its share to those after it, then to `python`.
KINDS = (
    ("data", 0.07, (".json", ".xml", ".yaml", ".csv", ".toml", ".cfg")),
    ("scripts", 0.06, (".js", ".pl", ".pm", ".sh", ".vim", ".php", ".tcl", ".lua", ".sql", ".cmake", ".awk")),
    ("markup", 0.06, (".md", ".rst")),
    ("documentation", 0.10, (".txt", ".html", ".htm", ".pod", ".texi", "", ".doc.gz")),
    ("manual", 0.18, (".man.gz",)),
    ("headers", 0.15, (".h", ".hpp", ".c", ".cc", ".cpp", ".hh", ".cuh", ".tcc")),
    ("python", 0.30, (".py", ".pyi", ".pyx")),
    ("docstrings", 0.08, ()),
)
NAMES = [name for name, _, _ in KINDS]
# The corpus as two sources and as eight.
GROUPS: dict[int, dict[str, list[str]]] = {
    2: {"prose": ["documentation", "manual", "markup", "docstrings"], "code": ["python", "headers", "scripts", "data"]},
    8: {name: [name] for name in NAMES},
}
_DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
_WORD = re.compile(r"[A-Za-z]{4,}")


def build(folder: Path, megabytes: int, say: Any = print) -> dict[str, Any]:
    """The corpus in `folder`, made unless it is there; returns `corpus.json`."""
    summary = folder / "corpus.json"
    if summary.exists():
        found: dict[str, Any] = json.loads(summary.read_text())
        if (found["version"], found["megabytes"]) == (VERSION, megabytes):
            return found
    shutil.rmtree(folder, ignore_errors=True)  # with what peers converted another corpus to
    folder.mkdir(parents=True)
    say(f"looking for {megabytes} MB of text on this machine")
    texts, real = _collect(megabytes * 1_000_000 * 100 // (100 - WARM_PERCENT))
    facts: dict[str, Any] = {"version": VERSION, "megabytes": megabytes, "kinds": {}}
    digest = hashlib.sha256()
    sample: list[str] = []
    for kind, documents in texts.items():
        cut = len(documents) * WARM_PERCENT // 100
        for split, part in (("warm", documents[:cut]), ("main", documents[cut:])):
            _write(folder / split / kind, part)
        for text in documents:
            digest.update(text.encode())
        size = sum(len(text.encode()) for text in documents[cut:])
        facts["kinds"][kind] = {"documents": len(documents) - cut, "bytes": size}
        sample += documents[cut :: max(1, len(texts) * size // TRAINING_BYTES)]
    facts["bytes"] = sum(kind["bytes"] for kind in facts["kinds"].values())
    facts["documents"] = sum(kind["documents"] for kind in facts["kinds"].values())
    facts["distinct_bytes"] = min(real, facts["bytes"])
    facts["sha256"] = digest.hexdigest()
    say(f"training a tokenizer of {VOCAB_SIZE:,} tokens on {sum(map(len, sample)) / 1e6:.0f} MB")
    _train(sample, folder / "tokenizer")
    say("encoding the corpus once, for the arms that read tokens")
    write_tokens(folder, facts)
    summary.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def files(folder: Path, split: str, sources: int, suffix: str) -> dict[str, list[str]]:
    """Source → its files of one format, sorted. `suffix`: `jsonl`, `jsonl.zst` or `parquet`."""
    return {
        source: sorted(str(file) for kind in kinds for file in (folder / split / kind).glob(f"?????.{suffix}"))
        for source, kinds in GROUPS[sources].items()
    }


def weights(facts: dict[str, Any], sources: int) -> dict[str, float]:
    """Source → its share of the corpus's tokens."""
    total = sum(kind["tokens"] for kind in facts["kinds"].values())
    return {
        source: sum(facts["kinds"][kind]["tokens"] for kind in kinds) / total
        for source, kinds in GROUPS[sources].items()
    }


def write_tokens(folder: Path, facts: dict[str, Any]) -> None:
    """Encode every document: `<kind>.npy` uint16[tokens], each document followed by token 0, `<kind>.ends.npy` int64
    where each ends. Adds `tokens` to the facts of each kind and in total."""
    from data_scheduler.encoder import load_encoder

    encoder = load_encoder(folder / "tokenizer")
    for split in ("warm", "main"):
        for kind in NAMES:
            (folder / split / "tokens").mkdir(exist_ok=True)
            rows = []
            for file in sorted((folder / split / kind).glob("?????.jsonl")):
                for line in file.read_bytes().splitlines():
                    rows.append(encoder.encode(orjson.loads(line)["text"]).astype(np.uint16))
                    rows.append(np.zeros(1, np.uint16))
            ends = np.cumsum([len(a) + 1 for a in rows[::2]], dtype=np.int64)
            np.save(folder / split / "tokens" / f"{kind}.npy", np.concatenate(rows))
            np.save(folder / split / "tokens" / f"{kind}.ends.npy", ends)
            if split == "main":
                facts["kinds"][kind]["tokens"] = int(ends[-1])
    facts["tokens"] = sum(kind["tokens"] for kind in facts["kinds"].values())


def _collect(wanted: int) -> tuple[dict[str, list[str]], int]:
    """(kind → documents in a fixed random order, bytes that are real)."""
    candidates = _candidates()
    seen: set[bytes] = set()
    texts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    spare = 0.0
    left: Iterator[Path] = iter(())
    for kind, share, suffixes in KINDS:
        budget = wanted * share + spare
        if kind == "docstrings":
            source = _docstrings(left)  # of the modules that `python` did not take
        else:
            left = iter(candidates[suffixes])
            source = _readable(left)
        texts[kind], sizes[kind] = _take(source, budget, seen)
        spare = max(0.0, budget - sizes[kind])
    texts["python"], more = _take(_readable(iter(candidates[KINDS[6][2]])), spare, seen, texts["python"])
    sizes["python"] += more
    modules = _readable(iter(candidates[KINDS[6][2]]))
    for kind in NAMES:
        if len(texts[kind]) < FEWEST:
            cut = _cut_up(modules, FEWEST - len(texts[kind]))
            texts[kind], more = _take(cut, float("inf"), seen, texts[kind])
            sizes[kind] += more
    real = sum(sizes.values())
    turn = 0
    while (missing := wanted - sum(sizes.values())) > 100_000 and real:
        for kind in NAMES:
            copies = (_scrambled(text, turn) for text in list(texts[kind]))
            texts[kind], more = _take(copies, missing * sizes[kind] / sum(sizes.values()), seen, texts[kind])
            sizes[kind] += more
        turn += 1
    for kind, documents in texts.items():
        random.Random(f"order {kind}").shuffle(documents)
    return texts, real


def _candidates() -> dict[tuple[str, ...], list[Path]]:
    """Files by their suffixes' group, in an order that depends on their paths alone."""
    roots = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}
    roots |= {Path("/usr/include"), Path("/usr/lib"), Path("/usr/share")}
    group = {suffix: suffixes for _, _, suffixes in KINDS for suffix in suffixes}
    found: dict[str, tuple[str, ...]] = {}
    for root in sorted(roots):
        for here, below, names in os.walk(root):
            below[:] = [name for name in below if name != "__pycache__"]
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if suffix == ".gz":
                    suffix = ".man.gz" if "/man/" in here else ".doc.gz"
                path = os.path.join(here, name)
                if suffix in group and not os.path.islink(path):
                    found[path] = group[suffix]
    ordered = sorted(found, key=lambda path: hashlib.blake2b(path.encode("utf-8", "replace"), digest_size=8).digest())
    return {suffixes: [Path(p) for p in ordered if found[p] == suffixes] for _, _, suffixes in KINDS if suffixes}


def _readable(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if SMALLEST <= len(text) <= LARGEST and "\0" not in text:
            yield text


def _docstrings(paths: Iterator[Path]) -> Iterator[str]:
    """The triple-quoted strings of each module as one document."""
    for text in _readable(paths):
        document = "\n\n".join(found.strip() for found in _DOCSTRING.findall(text))
        if len(document) >= SMALLEST:
            yield document


def _cut_up(texts: Iterator[str], wanted: int) -> Iterator[str]:
    """`wanted` documents of PIECE characters; no two are cut from the same text at the same place."""
    pieces = (text[i : i + PIECE] for text in texts for i in range(0, len(text) - PIECE + 1, PIECE))
    return itertools.islice(pieces, wanted)


def _take(
    source: Iterator[str], budget: float, seen: set[bytes], have: list[str] | None = None
) -> tuple[list[str], int]:
    """Documents not seen before until `budget` bytes are there, after those of `have`; the bytes taken."""
    taken, size = list(have or ()), 0
    while size < budget:
        text = next(source, None)
        if text is None:
            break
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            taken.append(text)
            size += len(data)
    return taken, size


def _scrambled(text: str, turn: int) -> str:
    rng = random.Random(f"{turn} {text[:200]} {len(text)}")

    def shuffle(match: re.Match[str]) -> str:
        word = match.group()
        return "".join(rng.sample(word, len(word))) if rng.random() < 1 / 8 else word

    return _WORD.sub(shuffle, text)


def _write(folder: Path, documents: list[str]) -> None:
    """The documents as .jsonl, .jsonl.zst and .parquet shards of SHARD_BYTES of text."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.string())])
    for number, shard in enumerate(_pieces(documents, SHARD_BYTES)):
        records = [{"id": f"{folder.name}-{number}-{i}", "text": text} for i, text in enumerate(shard)]
        lines = b"".join(orjson.dumps(record) + b"\n" for record in records)
        name = folder / f"{number:05d}"
        name.with_suffix(".jsonl").write_bytes(lines)
        name.with_suffix(".jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=3).compress(lines))
        with pyarrow.parquet.ParquetWriter(name.with_suffix(".parquet"), schema, compression="zstd") as writer:
            for texts in _pieces(shard, ROW_GROUP_BYTES):
                rows = [{"id": records[0]["id"], "text": text} for text in texts]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))


def _pieces(documents: list[str], size: int) -> Iterator[list[str]]:
    piece: list[str] = []
    held = 0
    for text in documents:
        piece.append(text)
        held += len(text.encode())
        if held >= size:
            yield piece
            piece, held = [], 0
    if piece:
        yield piece


def _train(texts: list[str], folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}) + "\n")
