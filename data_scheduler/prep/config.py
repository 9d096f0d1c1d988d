"""The configuration of `headrace data prep`: what to read, what to do with it, where to write, who runs it.

Thresholds carry datatrove's names and defaults, which are those of the papers.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_scheduler.config import Share, StrictModel

FieldType = Literal["text", "integer", "number", "boolean"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class InputConfig(StrictModel):
    """The raw documents."""

    paths: Annotated[list[str], Field(min_length=1)]
    """Files, folders, glob patterns or fsspec URLs. A task is a file, so many files keep many workers busy."""
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    """`auto` goes by the file name; `.gz`, `.zst`, `.bz2` and `.xz` are recognised behind jsonl and text."""
    text_key: str = "text"
    """Field or column that holds the text; dots go into nested objects."""
    id_key: str | None = "id"
    """Field or column that names the document; where it is missing, or null here, file and record number do."""
    keep: dict[str, FieldType] = Field(default={})
    """More fields to carry into the output, with their types."""


class LanguageStep(StrictModel):
    """Keep documents in some languages, as a fastText model sees them. Adds `language` and `language_score`."""

    kind: Literal["language"]
    """Which step this is."""
    model: str
    """Path of a fastText language model, such as lid.176.bin; nothing is downloaded."""
    languages: list[str] | None = None
    """The model's labels to keep; null keeps every language the model is sure of."""
    min_score: Fraction = 0.65
    """Probability a kept language must have."""


class GopherQualityStep(StrictModel):
    """Rules of Gopher (arXiv 2112.11446, appendix A.1.1) about words, symbols, bullets and stop words."""

    kind: Literal["gopher_quality"]
    """Which step this is."""
    min_doc_words: int = 50
    """Fewest words."""
    max_doc_words: int = 100_000
    """Most words."""
    min_avg_word_length: float = 3
    """Shortest mean word, in characters."""
    max_avg_word_length: float = 10
    """Longest mean word, in characters."""
    max_symbol_word_ratio: Share = 0.1
    """Most `#` or ellipses per word."""
    max_bullet_lines_ratio: Fraction = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_lines_ratio: Fraction = 0.3
    """Largest share of lines that end with an ellipsis."""
    max_non_alpha_words_ratio: Fraction = 0.8
    """Smallest share of words with a letter (the name is datatrove's)."""
    min_stop_words: int = 2
    """How many different stop words a text must have."""
    stop_words: list[str] | None = None
    """The stop words; null takes Gopher's eight English ones."""


class GopherRepetitionStep(StrictModel):
    """Rules of Gopher (arXiv 2112.11446, table A1) against repeated lines, paragraphs and word sequences."""

    kind: Literal["gopher_repetition"]
    """Which step this is."""
    dup_line_frac: Fraction = 0.3
    """Largest share of lines that came before."""
    dup_para_frac: Fraction = 0.3
    """Largest share of paragraphs that came before."""
    dup_line_char_frac: Fraction = 0.2
    """Largest share of characters in such lines."""
    dup_para_char_frac: Fraction = 0.2
    """Largest share of characters in such paragraphs."""


class C4Step(StrictModel):
    """Rules of C4 (arXiv 1910.10683): drops lines that are no sentences, then documents with too few sentences left."""

    kind: Literal["c4"]
    """Which step this is."""
    filter_no_terminal_punct: bool = True
    """Drop lines that do not end like a sentence."""
    min_num_sentences: int = 5
    """Fewest sentences of a document; -1 for any number."""
    min_words_per_line: int = 3
    """Fewest words of a line; -1 for any number."""
    max_word_length: int = 1000
    """Lines with a longer word are dropped; -1 for any length."""
    filter_lorem_ipsum: bool = True
    """Drop documents that contain `lorem ipsum`."""
    filter_javascript: bool = True
    """Drop lines that mention JavaScript."""
    filter_curly_bracket: bool = True
    """Drop documents that contain `{`, which is all code."""
    filter_policy: bool = True
    """Drop lines about cookies and terms of use."""


class FineWebStep(StrictModel):
    """FineWeb's own rules (arXiv 2406.17557) against lists, menus and repeated lines."""

    kind: Literal["fineweb_quality"]
    """Which step this is."""
    line_punct_thr: Fraction = 0.12
    """Smallest share of lines that end like a sentence."""
    short_line_thr: Fraction = 0.67
    """Largest share of short lines."""
    short_line_length: int = 30
    """Characters up to which a line is short."""
    char_duplicates_ratio: Fraction = 0.01
    """Largest share of characters in repeated lines."""
    new_line_ratio: Share = 0.3
    """Most line ends per word."""


class ExactDedupStep(StrictModel):
    """Keep one of the documents with the same text, or cut out spans of sentences that came before."""

    kind: Literal["exact_dedup"]
    """Which step this is."""
    unit: Literal["document", "sentences"] = "document"
    """`document` compares whole texts, `sentences` (as C4) every span of `n_sentences` in a row."""
    n_sentences: Count = 3
    """With `sentences`: length of the spans."""
    min_doc_words: int = 50
    """With `sentences`: a document cut below this many words is removed."""


class MinhashDedupStep(StrictModel):
    """Keep one of each cluster of near duplicates (MinHash over word n-grams).

    Two documents of similarity s meet with probability 1 − (1 − s^hashes_per_bucket)^num_buckets: 0.92 at s = 0.8, 0.56
    at 0.7, 0.21 at 0.6 with the defaults.
    """

    kind: Literal["minhash_dedup"]
    """Which step this is."""
    n_grams: Count = 5
    """Words in a row that are compared; shorter documents are never duplicates."""
    num_buckets: Count = 14
    """Chances to meet."""
    hashes_per_bucket: Count = 8
    """Hashes that must agree to meet."""
    seed: int = 1
    """Seed of the hash functions."""


class TokensStep(StrictModel):
    """Count tokens. Adds `tokens`, without the end-of-document token."""

    kind: Literal["tokens"]
    """Which step this is."""
    tokenizer: str
    """Path of a `tokenizer.json`, of a folder that holds one, or of a SentencePiece `.model`."""


class LengthStep(StrictModel):
    """Measure length. Adds `chars`, the characters of the text."""

    kind: Literal["length"]
    """Which step this is."""


class CompressionStep(StrictModel):
    """How well the text compresses. Adds `compression_ratio`, compressed bytes per byte of text: low is repetitive."""

    kind: Literal["compression"]
    """Which step this is."""
    codec: Literal["zlib", "zstd"] = "zlib"
    """zlib at level 6 or zstd at level 3."""


class RareWordsStep(StrictModel):
    """How unusual the words are. Adds `rare_word_share`, the share of words outside the corpus's most frequent.

    Words are counted, in lower case, over the documents that reached this step.
    """

    kind: Literal["rare_words"]
    """Which step this is."""
    frequent: Count = 10_000
    """How many of the most frequent words are not rare."""


Step = Annotated[
    LanguageStep
    | GopherQualityStep
    | GopherRepetitionStep
    | C4Step
    | FineWebStep
    | ExactDedupStep
    | MinhashDedupStep
    | TokensStep
    | LengthStep
    | CompressionStep
    | RareWordsStep,
    Field(discriminator="kind"),
]


class LocalExecutor(StrictModel):
    """Run here, in worker processes."""

    kind: Literal["local"] = "local"
    """Which executor this is."""
    workers: Count | None = None
    """Tasks at a time; null: as many as there are CPUs."""


class SlurmExecutor(StrictModel):
    """Submit a chain of SLURM job arrays, one for each pass; files and output must be on a shared file system."""

    kind: Literal["slurm"]
    """Which executor this is."""
    partition: str
    """Partition to submit to."""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")]
    """Time limit of a job, as sbatch takes it: `04:00:00`."""
    workers: Count | None = None
    """Array tasks at a time; null: no limit."""
    cpus_per_task: Count = 1
    """CPUs of a task; more than one only to get more memory."""
    mem_per_cpu_gb: Count = 4
    """Memory for each CPU."""
    tasks_per_job: Count = 1
    """Tasks (files) done one after the other by one array element."""
    qos: str | None = None
    """Quality of service."""
    sbatch_args: dict[str, str] = Field(default={})
    """More options for sbatch, without the dashes: `account: nlp`."""


class PrepConfig(StrictModel):
    """A whole preparation. Everything but `executor` decides the bytes of the output."""

    input: InputConfig
    """What to read."""
    steps: Annotated[list[Step], Field(min_length=1)]
    """What to do, in this order."""
    out: str
    """Folder to write to; local, or shared by the nodes."""
    output_format: Literal["parquet", "jsonl"] = "parquet"
    """parquet (zstd) or `.jsonl.zst`, a file for each input file that has documents left."""
    keep_removed: bool = False
    """Keep removed documents in `removed/<step>/`."""
    words: str = "plain"
    """How words are told apart: `plain` (by spaces and punctuation; nothing to install), or a language code of
    datatrove's word tokenizers (`pip install 'datatrove[multilingual]'`), for languages without spaces."""
    executor: Annotated[LocalExecutor | SlurmExecutor, Field(discriminator="kind")] = LocalExecutor()
    """Where it runs."""

    @model_validator(mode="after")
    def _columns_are_unique(self) -> "PrepConfig":
        taken = {"id": "every document", "text": "every document"}
        for number, step in enumerate(self.steps):
            for column in COLUMNS.get(step.kind, {}):
                if column in taken:
                    raise ValueError(f"steps.{number} ({step.kind}) gives {column!r}, which is {taken[column]}'s")
                taken[column] = f"steps.{number}"
        for name in self.input.keep:
            if name in taken:
                raise ValueError(f"input.keep: {name!r} is a column of {taken[name]}")
        if "://" in self.out:
            raise ValueError("out must be a folder, not a URL")
        return self

    def columns(self) -> dict[str, FieldType]:
        """Output columns after `id` and `text`, in order."""
        found: dict[str, FieldType] = dict(self.input.keep)
        for step in self.steps:
            found |= COLUMNS.get(step.kind, {})
        return found


COLUMNS: dict[str, dict[str, FieldType]] = {
    "language": {"language": "text", "language_score": "number"},
    "tokens": {"tokens": "integer"},
    "length": {"chars": "integer"},
    "compression": {"compression_ratio": "number"},
    "rare_words": {"rare_word_share": "number"},
}
"""What each kind of step adds to a document."""
