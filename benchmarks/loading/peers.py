"""The other loaders, each as its documentation sets it up, in one process without workers.

Without workers because the measure is CPU seconds per token: moving batches between processes costs each of them 2 to
10 times more, and none of them needs it here. From text, sources are mixed by documents, as these loaders do; the
shares are those that give the natural shares of tokens. From tokens, by the natural shares themselves.

The text arms read uncompressed `.jsonl` and encode with Hugging Face `tokenizers` (what their users have) or with
gigatoken (so that the rest of the loader is compared), in batches where the loader has batches.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from loading import corpus
from loading.child import Arm, Spec
from loading.prepare import prepared
from loading.standins import install

Array = npt.NDArray[Any]
END = np.zeros(1, np.uint32)
DOCUMENTS_A_CALL = 64


# -- tokenizers ------------------------------------------------------------------------------------------------------


class HuggingFace:
    """`tokenizers`, its faster batch call, which gives ids without offsets."""

    def __init__(self, file: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(file)

    def many(self, texts: list[str]) -> list[Array]:
        return [np.array(e.ids, np.uint32) for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def one(self, text: str) -> Array:
        return self.many([text])[0]


class Gigatoken:
    """gigatoken, arrays without copies."""

    def __init__(self, file: str) -> None:
        import gigatoken

        self.tokenizer = gigatoken.Tokenizer(file)

    def many(self, texts: list[str]) -> list[Array]:
        layout = self.tokenizer.encode_batch(texts, parallel=False).layout
        ends, ids = np.asarray(layout.offsets.data), np.asarray(layout.content.data)
        return [ids[start:end] for start, end in pairwise(ends.tolist())]

    def one(self, text: str) -> Array:
        return self.tokenizer.encode(text)


def tokenizer(spec: Spec, kept: dict[str, Any]) -> Any:
    """The arm's tokenizer, made once."""
    if "tokenizer" not in kept:
        kind = {"huggingface": HuggingFace, "gigatoken": Gigatoken}[spec["tokenizer"]]
        kept["tokenizer"] = kind(str(Path(spec["folder"]) / "tokenizer" / "tokenizer.json"))
    return kept["tokenizer"]


def document_shares(spec: Spec) -> dict[str, float]:
    """Source → its share of the documents."""
    kinds = json.loads((Path(spec["folder"]) / "corpus.json").read_text())["kinds"]
    total = sum(kind["documents"] for kind in kinds.values())
    groups = corpus.GROUPS[spec["sources"]].items()
    return {source: sum(kinds[name]["documents"] for name in names) / total for source, names in groups}


class Rows:
    """Concatenate and cut: documents in, arrays of `length` tokens out."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._rest = np.empty(0, np.uint32)

    def add(self, documents: list[Array]) -> Iterator[Array]:
        """The rows that are full now."""
        parts = [self._rest]
        for document in documents:
            parts += [document, END]
        flat = np.concatenate(parts)
        full = len(flat) // self.length
        self._rest = flat[full * self.length :]
        yield from flat[: full * self.length].reshape(full, self.length)


def epochs(one: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
    """Epoch after epoch, from 1."""
    for epoch in count(1):
        empty = True
        for batch in one(epoch):
            empty = False
            yield batch
        if empty:
            raise ValueError("an epoch has no batch: the corpus is too small for this loader")


# -- from text -------------------------------------------------------------------------------------------------------


def datasets(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """Hugging Face datasets: streaming, shuffle buffer, interleave; packed as torchtitan did with it."""
    import torch
    from datasets import interleave_datasets, load_dataset

    shares = document_shares(spec)
    files = corpus.files(Path(spec["folder"]), split, spec["sources"], "jsonl")
    parts = [
        load_dataset("json", data_files=files[name], split="train", streaming=True).shuffle(seed=0, buffer_size=1000)
        for name in shares
    ]
    mixed = interleave_datasets(parts, probabilities=list(shares.values()), seed=0, stopping_strategy="all_exhausted")
    encode, rows = tokenizer(spec, kept).many, Rows(spec["seq_len"])

    def batches() -> Iterator[int]:
        texts, held = [], []
        for example in mixed:
            texts.append(example["text"])
            if len(texts) < DOCUMENTS_A_CALL:
                continue
            for row in rows.add(encode(texts)):
                held.append(row)
                if len(held) == spec["batch"]:
                    yield torch.from_numpy(np.stack(held).astype(np.int64)).numel()
                    held = []
            texts = []

    return batches()


def torchdata(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """torchdata nodes: a weighted sampler over readers, batched encoding, packing as a node."""
    import torch
    import torchdata.nodes as nodes

    shares = document_shares(spec)
    files = corpus.files(Path(spec["folder"]), split, spec["sources"], "jsonl")
    readers = {name: nodes.IterableWrapper(_Lines(files[name])) for name in shares}
    mixed = nodes.MultiNodeWeightedSampler(readers, shares, seed=0)
    encoded = nodes.Mapper(nodes.Batcher(mixed, DOCUMENTS_A_CALL), tokenizer(spec, kept).many)

    class Pack(nodes.BaseNode[Array]):
        """Documents to rows."""

        def reset(self, initial_state: dict[str, Any] | None = None) -> None:
            super().reset(initial_state)
            encoded.reset(None if initial_state is None else initial_state["source"])
            self.rows = Rows(spec["seq_len"])
            self.ready: Iterator[Array] = iter(())

        def next(self) -> Array:
            while (row := next(self.ready, None)) is None:
                self.ready = self.rows.add(next(encoded))
            return row

        def get_state(self) -> dict[str, Any]:
            return {"source": encoded.state_dict()}

    def stack(rows: list[Array]) -> Any:
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    loader = nodes.Loader(nodes.Mapper(nodes.Batcher(Pack(), spec["batch"]), stack))
    return (batch.numel() for batch in loader)


class _Lines:
    """The texts of `.jsonl` files, in order."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with open(file, "rb") as lines:
                for line in lines:
                    yield orjson.loads(line)["text"]


def grain_text(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """Grain: indexed lines, global shuffle, encoding as a map, mix, concat-then-split."""
    import grain

    files = corpus.files(Path(spec["folder"]), split, spec["sources"], "jsonl")
    shares = document_shares(spec)
    encode = tokenizer(spec, kept).one

    def tokens(line: bytes) -> dict[str, Array]:
        return {"tokens": np.append(encode(orjson.loads(line)["text"]), END).astype(np.int32)}

    parts = [
        grain.MapDataset.source(_IndexedLines(files[name])).seed(0).shuffle().repeat().map(tokens) for name in shares
    ]
    mixed = grain.MapDataset.mix(parts, list(shares.values())).to_iter_dataset(_grain_options(spec))
    packed = grain.experimental.ConcatThenSplitIterDataset(mixed, length_struct={"tokens": spec["seq_len"]})
    return (batch["tokens"].size for batch in packed.batch(spec["batch"]))


class _IndexedLines:
    """Random access to the lines of `.jsonl` files."""

    def __init__(self, files: list[str]) -> None:
        self.places: list[tuple[int, int, int]] = []
        self.open = [os.open(file, os.O_RDONLY) for file in files]
        for number, file in enumerate(files):
            start = 0
            for line in Path(file).read_bytes().splitlines(keepends=True):
                self.places.append((number, start, len(line)))
                start += len(line)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, record: Any) -> bytes:
        number, start, size = self.places[record]
        return os.pread(self.open[number], size, start)


# -- from tokens -----------------------------------------------------------------------------------------------------


def _copy(spec: Spec, split: str, peer: str) -> Path:
    folder = prepared(Path(spec["folder"]), split, peer, spec["sources"], spec["seq_len"])
    if not (folder / ".done").exists():
        raise FileNotFoundError(f"the corpus was not converted for {peer}; see the messages of the preparation")
    return folder


def _grain_options(spec: Spec) -> Any:
    import grain

    # Reading in the caller's thread: the default's 16 threads cost CPU time on one core.
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0) if spec.get("plain", True) else grain.ReadOptions()


def grain_records(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """Grain: ArrayRecord of fixed-length samples, global shuffle, mix."""
    import grain

    folder = _copy(spec, split, "grain")

    def tokens(record: bytes) -> Array:
        return np.frombuffer(record, np.uint16).astype(np.int32)

    parts = [
        grain.MapDataset.source(grain.sources.ArrayRecordDataSource([str(folder / f"{name}.array_record")]))
        .seed(0).shuffle().repeat().map(tokens)
        for name in spec["weights"]
    ]  # fmt: skip
    mixed = grain.MapDataset.mix(parts, list(spec["weights"].values())).batch(spec["batch"])
    return (batch.size for batch in mixed.to_iter_dataset(_grain_options(spec)))


def mosaic(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """mosaicml-streaming: a stream per source with its proportion, shuffled, StreamingDataLoader."""
    install()
    import streaming
    import torch

    streaming.base.util.clean_stale_shared_memory()
    folder = _copy(spec, split, "mosaic")

    class Tokens(streaming.StreamingDataset):
        """As LLM Foundry's StreamingTextDataset."""

        def __getitem__(self, at: Any) -> Any:
            return torch.from_numpy(super().__getitem__(at)["tokens"].astype(np.int64))

    streams = [streaming.Stream(local=str(folder / name), proportion=w) for name, w in spec["weights"].items()]
    dataset = Tokens(streams=streams, batch_size=spec["batch"], shuffle=True, shuffle_seed=0)
    loader = streaming.StreamingDataLoader(dataset, batch_size=spec["batch"], num_workers=0)
    return (batch.numel() for batch in epochs(lambda _: loader))


def litdata(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """litdata: TokensLoader datasets, combined by weight, StreamingDataLoader."""
    install()
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader

    folder = _copy(spec, split, "litdata")
    parts = [
        StreamingDataset(str(folder / name), item_loader=TokensLoader(block_size=spec["seq_len"]), shuffle=True)
        for name in spec["weights"]
    ]
    mixed = CombinedStreamingDataset(parts, weights=list(spec["weights"].values()), iterate_over_all=False)
    loader = StreamingDataLoader(mixed, batch_size=spec["batch"], num_workers=0)
    return (batch.numel() for batch in epochs(lambda _: loader))


class _Eod:
    """What GPTDataset asks of a tokenizer."""

    eod = 0
    pad = -1
    vocab_size = corpus.VOCAB_SIZE
    unique_identifiers = {"class": "headrace benchmark"}  # noqa: RUF012


def megatron(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """megatron-core: GPTDataset per source, BlendedDataset, torch's DataLoader."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from torch import distributed
    from torch.utils.data import DataLoader

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    folder = _copy(spec, split, "megatron")
    prefixes = [str(folder / name) for name in spec["weights"]]
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=spec["seq_len"],
        blend=(prefixes, list(spec["weights"].values())),
        split="1,0,0",
        path_to_cache=tempfile.mkdtemp(prefix="megatron-index-"),
        tokenizer=_Eod(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    samples = (spec["tokens"] if split == "main" else spec["warm_tokens"]) // spec["seq_len"] + spec["batch"]
    built = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    loader = DataLoader(built[0], batch_size=spec["batch"], shuffle=False, num_workers=0, drop_last=True)
    return (batch["tokens"].numel() for batch in epochs(lambda _: loader))


def olmo(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """OLMo-core: numpy sources, concat-and-chunk, instance mix, ComposableDataLoader."""
    from olmo_core.data import DataCollator, TokenizerConfig
    from olmo_core.data.composable import (
        ComposableDataLoader,
        ConcatAndChunkInstanceSourceConfig,
        MixingInstanceSource,
    )

    folder = _copy(spec, split, "olmo")
    work = tempfile.mkdtemp(prefix="olmo-work-")
    words = TokenizerConfig(vocab_size=corpus.VOCAB_SIZE, eos_token_id=0, pad_token_id=0)
    parts = []
    for name, weight in spec["weights"].items():
        files = sorted(str(file) for file in (folder / name).glob("*.npy"))
        chunked = ConcatAndChunkInstanceSourceConfig.from_npy(
            *files, tokenizer=words, sequence_length=spec["seq_len"], dtype="uint16"
        )
        parts.append(MixingInstanceSource.Spec(source=chunked.build(work), ratio=weight, max_repetition_factor=1.2))
    loader = ComposableDataLoader(
        MixingInstanceSource(*parts, work_dir=work, seed=0),
        collator=DataCollator(pad_token_id=0),
        tokenizer=words,
        global_batch_size=spec["batch"] * spec["seq_len"],
        work_dir=work,
        seed=0,
        shuffle=True,
        display_source_visualization=False,
    )

    def one_epoch(epoch: int) -> Any:
        loader.reshuffle(epoch=epoch)
        return loader

    return (batch["input_ids"].numel() for batch in epochs(one_epoch))


ARMS: dict[str, Arm] = {
    "datasets": datasets,
    "torchdata": torchdata,
    "grain_text": grain_text,
    "grain_records": grain_records,
    "mosaic": mosaic,
    "litdata": litdata,
    "megatron": megatron,
    "olmo": olmo,
}
