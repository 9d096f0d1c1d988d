"""The corpus in each peer's own format: `python -m loading.prepare <folder> <sources> <seq_len> <peer>…`.

Made from the token files of the corpus, so that every arm has the same tokens in the same documents. What it costs is
not counted: a pre-tokenized peer's user has paid for it before, and for reading and tokenizing everything once.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loading.corpus import GROUPS
from loading.standins import install

Tokens = npt.NDArray[np.uint16]


def documents(folder: Path, split: str, kinds: list[str]) -> Iterator[Tokens]:
    """Every document's tokens, end-of-document token included."""
    for kind in kinds:
        tokens = np.load(folder / split / "tokens" / f"{kind}.npy", mmap_mode="r")
        start = 0
        for end in np.load(folder / split / "tokens" / f"{kind}.ends.npy").tolist():
            yield tokens[start:end]
            start = end


def blocks(folder: Path, split: str, kinds: list[str], length: int) -> Iterator[Tokens]:
    """The documents concatenated and cut into blocks of `length`; the last, short one is dropped."""
    everything = np.concatenate([np.load(folder / split / "tokens" / f"{kind}.npy") for kind in kinds])
    for start in range(0, len(everything) - length + 1, length):
        yield everything[start : start + length]


def megatron(folder: Path, split: str, source: str, kinds: list[str], out: Path, length: int) -> None:
    """One `.bin`/`.idx` per source."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(out / f"{source}.bin"), dtype=np.uint16)
    for tokens in documents(folder, split, kinds):
        builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
    builder.finalize(str(out / f"{source}.idx"))


def mosaic(folder: Path, split: str, source: str, kinds: list[str], out: Path, length: int) -> None:
    """MDS of fixed-length samples, as LLM Foundry's conversion writes them."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out / source), columns={"tokens": f"ndarray:uint16:{length}"}) as writer:
        for block in blocks(folder, split, kinds, length):
            writer.write({"tokens": block})


def litdata(folder: Path, split: str, source: str, kinds: list[str], out: Path, length: int) -> None:
    """Chunks of whole blocks for `TokensLoader`, written by `optimize`."""
    from litdata import TokensLoader, optimize

    optimize(
        fn=_TokenTensors(folder, split),
        inputs=kinds,
        output_dir=str(out / source),
        chunk_size=length * 2048,
        item_loader=TokensLoader(),
        num_workers=1,
        verbose=False,
    )


class _TokenTensors:
    """A kind's documents as tensors; a class because `optimize` sends it to a process."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split

    def __call__(self, kind: str) -> Iterator[Any]:
        import torch

        for tokens in documents(self.folder, self.split, [kind]):
            yield torch.from_numpy(tokens.astype(np.int32))


def grain(folder: Path, split: str, source: str, kinds: list[str], out: Path, length: int) -> None:
    """ArrayRecord of fixed-length samples."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(out / f"{source}.array_record"), "group_size:1")
    for block in blocks(folder, split, kinds, length):
        writer.write(block.tobytes())
    writer.close()


def olmo(folder: Path, split: str, source: str, kinds: list[str], out: Path, length: int) -> None:
    """Raw uint16 files, as dolma writes them (`.npy` by name only)."""
    for kind in kinds:
        (out / source).mkdir(exist_ok=True)
        np.load(folder / split / "tokens" / f"{kind}.npy").tofile(out / source / f"{kind}.npy")


PREPARATIONS: dict[str, Callable[[Path, str, str, list[str], Path, int], None]] = {
    "megatron": megatron,
    "mosaic": mosaic,
    "litdata": litdata,
    "grain": grain,
    "olmo": olmo,
}


def prepared(folder: Path, split: str, peer: str, sources: int, length: int) -> Path:
    """Where a peer's copy lies."""
    return folder / split / f"{peer}-{sources}-{length}"


def prepare(folder: Path, peer: str, sources: int, length: int) -> None:
    """Make a peer's copy of both splits unless it is there."""
    for split in ("warm", "main"):
        out = prepared(folder, split, peer, sources, length)
        if (out / ".done").exists():
            continue
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for source, kinds in GROUPS[sources].items():
            PREPARATIONS[peer](folder, split, source, kinds, out, length)
        (out / ".done").touch()


if __name__ == "__main__":
    install()
    folder, sources, length, *peers = sys.argv[1:]
    for peer in peers:
        try:
            prepare(Path(folder), peer, int(sources), int(length))
        except Exception as error:  # The peer's arm will say that it has no data; the others go on.
            print(f"{peer}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
