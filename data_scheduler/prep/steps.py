"""A configured step as datatrove blocks.

Most steps are one block in the stream of documents. Deduplication and corpus statistics must see all documents first:
they add a block at the end of the pass before, passes of their own, and a block that begins the next pass.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
    SentDedupConfig,
    SentenceDedupFilter,
    SentenceDedupSignature,
    SentenceFindDedups,
)
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.hashing import HashConfig

from data_scheduler.prep import config as c
from data_scheduler.prep.language import language_filter
from data_scheduler.prep.rare_words import CountWords, MergeCounts, RareWords
from data_scheduler.prep.scores import Compression, Length, Tokens
from data_scheduler.prep.words import word_tokenizer
from data_scheduler.prep.writers import WorkWriter


@dataclass(frozen=True)
class Between:
    """A pass over what the tasks collected, not over documents."""

    name: str
    tasks: int
    blocks: list[PipelineStep]


@dataclass(frozen=True)
class StepBlocks:
    """What a step adds to the passes."""

    apply: PipelineStep
    """Filters or scores documents."""
    collect: PipelineStep | None = None
    """Ends the pass before, where the step must see all documents first."""
    between: list[Between] = field(default_factory=list)


FILTERS: dict[type, Any] = {
    c.GopherQualityStep: GopherQualityFilter,
    c.GopherRepetitionStep: GopherRepetitionFilter,
    c.C4Step: C4QualityFilter,
    c.FineWebStep: FineWebQualityFilter,
}
"""Steps whose settings are the block's arguments."""


HASH = HashConfig(precision=64, hash_fc="sha1")
"""datatrove's default, xxhash, fails with releases of that package from 4 on; the hash is a small part of the time."""


def step_blocks(step: c.Step, words: str, work: str, removed: str | None) -> StepBlocks:
    """The blocks of a step; `work` is its folder for what tasks collect, `removed` where removed documents go.

    Raises ConfigError when something it needs is not installed.
    """
    writer = None if removed is None else WorkWriter(removed)
    if isinstance(step, c.ExactDedupStep):
        return _exact_dedup(step, words, work, writer)
    if isinstance(step, c.MinhashDedupStep):
        return _minhash_dedup(step, words, work, writer)
    if isinstance(step, c.RareWordsStep):
        merge = Between("frequent-words", 1, [MergeCounts(work, step.frequent)])
        return StepBlocks(RareWords(work), CountWords(work), [merge])
    if isinstance(step, c.LanguageStep):
        return StepBlocks(language_filter(step, writer))
    if isinstance(step, c.TokensStep):
        return StepBlocks(Tokens(step.tokenizer))
    if isinstance(step, c.LengthStep):
        return StepBlocks(Length())
    if isinstance(step, c.CompressionStep):
        return StepBlocks(Compression(step.codec))
    settings = step.model_dump(exclude={"kind"})
    return StepBlocks(FILTERS[type(step)](**settings, exclusion_writer=writer, language=word_tokenizer(words)))


def whole_text(document: Document) -> str:
    """What exact deduplication compares."""
    text: str = document.text
    return text


def _exact_dedup(step: c.ExactDedupStep, words: str, work: str, writer: WorkWriter | None) -> StepBlocks:
    signatures, duplicates = _folders(work, "signatures", "duplicates")
    if step.unit == "document":
        config = ExactDedupConfig(content_getter=whole_text, hash_config=HASH, only_dedup_in_index=False)
        return StepBlocks(
            ExactDedupFilter(duplicates, config, writer),
            ExactDedupSignature(signatures, config),
            [Between("duplicates", 1, [ExactFindDedups(signatures, duplicates, config)])],
        )
    tokenizer = word_tokenizer(words)
    sentences = SentDedupConfig(
        n_sentences=step.n_sentences, min_doc_words=step.min_doc_words, hash_config=HASH, only_dedup_in_index=False
    )
    return StepBlocks(
        SentenceDedupFilter(duplicates, sentences, writer, tokenizer),
        SentenceDedupSignature(signatures, config=sentences, language=tokenizer),
        [Between("duplicates", 1, [SentenceFindDedups(signatures, duplicates, config=sentences)])],
    )


def _minhash_dedup(step: c.MinhashDedupStep, words: str, work: str, writer: WorkWriter | None) -> StepBlocks:
    signatures, buckets, clusters = _folders(work, "signatures", "buckets", "clusters")
    config = MinhashConfig(step.n_grams, step.num_buckets, step.hashes_per_bucket, step.seed, hash_config=HASH)
    return StepBlocks(
        MinhashDedupFilter(clusters, writer),
        MinhashDedupSignature(signatures, config, language=word_tokenizer(words)),
        [
            Between("buckets", step.num_buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
            Between("clusters", 1, [MinhashDedupCluster(buckets, clusters, config)]),
        ],
    )


def _folders(work: str, *names: str) -> list[str]:
    """Folders below `work`, made: datatrove lists them, also when no task had anything to write."""
    folders = [os.path.join(work, name) for name in names]
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    return folders
