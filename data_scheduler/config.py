"""The `data` section of a run's configuration: what to read, how to mix, order and pack it.

Everything that shapes the order of the data is here and nowhere else, so that this section, the seed in it and the
journal are enough to replay a run.
"""

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_scheduler import expression
from data_scheduler.mixture import ONE
from data_scheduler.objectives.config import Objective, find_problem
from data_scheduler.stage_config import Stage
from data_scheduler.stages import batch_sizes, check_stages, weights_of
from data_scheduler.strict_model import StrictModel as StrictModel
from data_scheduler.template import template_parts
from data_scheduler.transforms.config import Transform, check_together
from headrace.errors import ConfigError

MOST_LANES = 240
"""Lanes there are when nobody asks for more."""
OPEN_BYTES = 1 << 30
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 64 << 10, 4 << 20
Share = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Ease = Literal["ascending", "descending"]


class BandsConfig(StrictModel):
    """Bands of a source: records are told apart by a number that each has, and every band is a source of its own, in
    mixtures, losses and commands. `NAME.1` is the easiest."""

    by: Annotated[str, Field(min_length=1)]
    """Field with the number; dots go into nested objects. `length` is the characters of the text where records have no
    such field."""
    count: Annotated[int, Field(ge=2, le=100)] | None = None
    """So many bands that hold equal amounts of text; where they begin is measured when the source enters the run."""
    edges: Annotated[list[Number], Field(min_length=1, max_length=99)] | None = None
    """Instead of `count`: the numbers, ascending, at which the next band begins."""
    order: Ease = "ascending"
    """Which records are easy: those with low numbers (`ascending`) or with high ones (`descending`)."""

    @model_validator(mode="after")
    def _can_be_cut(self) -> "BandsConfig":
        if (self.count is None) == (self.edges is None):
            raise ValueError("give either count or edges")
        if self.edges is not None and any(low >= high for low, high in itertools.pairwise(self.edges)):
            raise ValueError(f"edges must ascend, got {', '.join(f'{edge:g}' for edge in self.edges)}")
        return self

    @property
    def number(self) -> int:
        """How many bands there are."""
        return self.count or len(self.edges or []) + 1


class BandConfig(StrictModel):
    """What makes a source one band of another."""

    of: str
    """The source with `bands`."""
    number: Annotated[int, Field(ge=1)]
    """1 is the easiest."""
    by: str
    """Field with the number."""
    order: Ease
    """Which end of the numbers is easy."""
    edges: list[Number]
    """Where bands begin, ascending: a record is in the interval [edge, next edge) that its number is in."""
    measured: bool
    """Whether the edges were measured, not given."""
    from_text: bool
    """Whether the number is the text's characters, not a field."""
    shares: list[Share]
    """Each band's part of the source's text, easiest first."""

    @model_validator(mode="after")
    def _is_whole(self) -> "BandConfig":
        count = len(self.shares)
        if self.number > count or len(self.edges) + 1 != count or sorted(set(self.edges)) != self.edges:
            raise ValueError("edges, shares and number do not go together; `band` is written by a run, not by people")
        return self


class SourceConfig(StrictModel):
    """One source of documents. A sequence never mixes two sources, so its loss is known exactly."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name in metrics, journal and commands."""
    paths: Annotated[list[str], Field(min_length=1)]
    """Files, folders, glob patterns or fsspec URLs. Sorted before use, so their order here does not matter."""
    val_paths: list[str] = []
    """Held-out files of the same kind; evaluated separately, never trained on."""
    format: Literal[
        "auto", "jsonl", "parquet", "arrow", "csv", "text", "npy", "megatron", "ds",
        "datatrove:warc", "datatrove:jsonl", "datatrove:csv", "datatrove:parquet", "datatrove:ipc",
    ] = "auto"  # fmt: skip
    """`auto` goes by the file name; `.gz`, `.zst`, `.bz2` and `.xz` are recognised behind jsonl, csv and text.
    `datatrove:<reader>` reads with datatrove's reader of that name."""
    text_key: str = "text"
    """Field or column that holds the text; dots go into nested objects."""
    template: str | None = None
    """Text made of several fields, e.g. `"{title}\\n\\n{text}"`; replaces `text_key`."""
    where: str | None = None
    """Filter on fields, e.g. `lang == 'de' and quality > 0.7`; records it does not hold for are left out."""
    bands: BandsConfig | None = None
    """Split the source by a number of its records, for a curriculum; a record without one is rejected."""
    band: BandConfig | None = None
    """Written by a run in the place of `bands`, for each band; not for people."""
    prompt: str | None = None
    """Text of fields put before each document, e.g. `"Question: {question}\\nAnswer: "`; the model reads them, but they
    carry no loss."""
    masked_key: str | None = None
    """Field with the stretches of the text that carry no loss: a list of [begin, end) pairs, in characters."""
    loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of this source's tokens in the loss."""
    loss_weight_key: str | None = None
    """Field with a document's own weight in the loss, a number from 0 on; multiplied with `loss_weight`."""
    transforms: list[Transform] = []
    """What is done to each document anew in every epoch, by seeded draws; in the order `templates`, `fim`,
    `bpe_dropout`, `prefix`, whatever their order here."""
    objectives: list[Objective] | None = None
    """What this source's documents teach, instead of `data.objectives`; `[]`: all of them causal."""
    weight: Share = 1.0
    """Share of tokens under the static policy; shares are normalised over the sources."""
    watch: bool = False
    """Look for new files behind `paths` while the run goes on; they join at a journaled step."""
    min_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Least share of tokens, whatever the policy wants; `policy.guard.min_share` when not given."""
    max_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Largest share of tokens, whatever the policy wants; `policy.guard.max_share` when not given."""
    max_epochs: Annotated[int, Field(ge=1)] | None = None
    """How often each document may be seen at most; once a lane is through, the other sources take over its share."""
    on_error: Literal["skip", "stop"] = "skip"
    """What a malformed record does: `skip` counts it and goes on, `stop` ends the run."""
    max_reject_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.001
    """Past this share of rejected records (once 1,000 records were read) the run stops with a data error."""
    max_document_bytes: Annotated[int, Field(ge=1)] = 100_000_000
    """A longer record or text is rejected: 100 MB are 25 million tokens, twenty times the longest book, and take
    some 300 MB of memory while they are read."""

    @model_validator(mode="after")
    def _expressions_are_understood(self) -> "SourceConfig":
        for template in (self.template, self.prompt):
            if template is not None:
                template_parts(template)
        if self.where is not None:
            expression.parse(self.where)
        if self.bands is not None and not (self.min_share is None and self.max_share is None):
            raise ValueError(
                "min_share and max_share bound one source, bands are several; bound them with policy.guard"
            )
        if self.transforms:
            check_together(self.transforms, self)
        return self


class GuardConfig(StrictModel):
    """What holds whatever the policy wants; for all policies alike."""

    min_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Least share of every source whose weight is above 0."""
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Largest share of any source."""
    max_change: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Largest change of any source's share in one update; a policy that wants more gets there in several."""
    max_epochs: Annotated[int, Field(ge=1)] | None = None
    """`max_epochs` of the sources that have none of their own. Once a source is through, its share goes to the others,
    past `max_share` if need be."""
    update_every: Annotated[int, Field(ge=1)] = 1
    """Steps between two changes of the mixture; the policy hears every report in between."""
    freeze_on_nan: bool = True
    """Keep the mixture for `freeze_steps` when a reported loss is NaN or infinite."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    """Likewise when a step's loss is more than this many times its running mean (over some fifty steps)."""
    freeze_steps: Annotated[int, Field(ge=1)] = 100
    """Steps that a freeze lasts; losses reported in it are kept from the policy."""


class PolicyConfig(StrictModel):
    """Which policy sets the mixture weights, and its own options."""

    kind: str = "static"
    """Name of a built-in policy, or of one in the entry-point group `headrace.policies`."""
    options: dict[str, Any] = {}
    """Handed to the policy as keyword arguments."""
    horizon: Annotated[int, Field(ge=1)] = 8
    """Steps between a measurement and the first batch it may shape; for policies that use feedback it must be larger
    than `prefetch`, so that batches prepared ahead never wait for a step that waits for them."""
    guard: GuardConfig = GuardConfig()
    """Bounds of the mixture, and when it stays as it is."""
    dry_run: bool = False
    """Draw by the configured weights, and only journal what the policy would do (`proposed`)."""


def default_lanes(data: Mapping[str, Any]) -> int:
    """Lanes for the `global_batch_size` in `data`, up to MOST_LANES: divided by every data-parallel size that divides
    the batch, or by as many of these sizes as can be (docs/decisions/009). With stages: for the largest batch."""
    # Either is not there when it was refused.
    batch = max(batch_sizes(data.get("global_batch_size", MOST_LANES), data.get("stages", ())))
    if batch <= MOST_LANES:
        return int(MOST_LANES - MOST_LANES % batch)
    return max(lanes for lanes in range(1, MOST_LANES + 1) if batch % lanes == 0)


class DataConfig(StrictModel):
    """The data scheduler's whole configuration."""

    tokenizer: str
    """Path of a `tokenizer.json`, of a folder that holds one, or of a SentencePiece `.model`."""
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """The sources; their order fixes the source ids in every batch."""
    seq_len: Annotated[int, Field(ge=1)] = 2048
    """Tokens the model sees per sequence; a packed sequence holds `seq_len + 1`."""
    global_batch_size: Annotated[int, Field(ge=1)] = 240
    """Sequences per step, over all data-parallel ranks."""
    stages: list[Stage] = []
    """How batch shape and weights change over the run, for a scheduler without our trainer; in a run's configuration
    they are given under `stages`."""
    lanes: Annotated[int, Field(ge=1, le=65536, default_factory=lambda data: default_lanes(data))]
    """Independent streams the data is dealt to; every data-parallel size that divides both this and the global batch
    size gives the same global batches. Default: the largest multiple of the global batch size up to 240, of a larger
    batch its largest divisor up to 240; with stages, of the largest batch. A run keeps what it began with."""
    seed: int = 0
    """Seed of every permutation of chunks, documents and slots."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents become full sequences, every token used once: `split` concatenates and cuts; `best_fit` lays out
    16 sequences at a time so that few documents are cut."""
    document_start: Literal["none", "bos"] = "none"
    """Token put before every document: none, or the tokenizer's beginning-of-sequence token."""
    document_end: Literal["none", "eos"] = "eos"
    """Token put after every document: the tokenizer's end-of-document token, or none."""
    chunk_bytes: Annotated[int, Field(ge=1024)] | None = None
    """Bytes of raw text one lane opens at a time; documents are shuffled within it. Default: 1 GiB / (lanes x sources),
    but at least 64 KiB and at most 4 MiB, so that all lanes of all sources are open in about 1 GB."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """Steps prepared ahead in a background thread; 0 prepares them in the caller's."""
    cache_dir: str | None = None
    """Folder for an index of files, and for copies of large compressed files that can be read in pieces;
    `$XDG_CACHE_HOME/headrace` or `~/.cache/headrace` when not given. Runs, ranks and nodes may share it, and it may be
    deleted when no run uses it; the data does not depend on it."""
    token_cache: str | None = None
    """Folder (a fast local disk) to keep encoded chunks in, so that later epochs and runs need not encode them again; 2
    or 4 bytes a token. Runs, ranks and nodes may share it, and it may be removed at any time."""
    cache_max_bytes: Annotated[int, Field(ge=0)] = 100 << 30
    """Disk space for copies; past it those used longest ago are removed. 0: make none."""
    watch_every: Annotated[int, Field(ge=1)] = 100
    """Steps between two looks for new files of sources with `watch`; a file joins once two looks found it the same."""
    policy: PolicyConfig = PolicyConfig()
    """Who sets the mixture weights."""
    objectives: list[Objective] = []
    """What documents teach: one of these is drawn for each document in each epoch, by weight; none: all are causal. Of
    held-out documents all are."""
    fast_tokenizer: bool = True
    """Use the fast exact encoder where it reproduces the tokenizer token for token; otherwise `tokenizers`."""

    def cache_folder(self) -> Path:
        """Where the index of files and the copies are."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace"

    @property
    def settled_chunk_bytes(self) -> int:
        """`chunk_bytes`, or its default for this many lanes and sources. A run keeps what it began with."""
        if self.chunk_bytes is not None:
            return self.chunk_bytes
        return min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, OPEN_BYTES // (self.lanes * len(self.sources))))

    @model_validator(mode="after")
    def _names_are_unique(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        names += [band for source in self.sources for band in band_names(source)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source name used twice: {', '.join(twice)}")
        if not any(source.weight > 0 for source in self.sources):
            raise ValueError("every source has weight 0; give at least one a positive weight")
        return self

    def objectives_of(self, source: SourceConfig) -> list[Objective]:
        """What the documents of a source teach."""
        return self.objectives if source.objectives is None else source.objectives

    @model_validator(mode="after")
    def _objectives_fit_their_sources(self) -> "DataConfig":
        for source in self.sources:
            problem = find_problem(self.objectives_of(source), source)
            if problem is not None:
                raise ValueError(f"source {source.name}: {problem}")
        return self

    @model_validator(mode="after")
    def _stages_make_sense(self) -> "DataConfig":
        check_stages(self)
        return self

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "DataConfig":
        for source, least, most in zip(self.sources, *share_bounds(self), strict=True):
            if least > most:
                raise ValueError(f"source {source.name}: min_share is above max_share")
        for number in [None, *(n for n, stage in enumerate(self.stages) if stage.weights is not None)]:
            low, high = share_bounds(self, weights_of(self, number))
            where = "" if number is None else f"stages.{number}.weights: "
            if sum(low) > ONE:
                raise ValueError(
                    f"{where}the sources' least shares sum to {sum(low) / ONE:.6g}, more than 1; lower min_share"
                )
            if sum(high) < ONE:
                raise ValueError(
                    f"{where}the sources' largest shares sum to {sum(high) / ONE:.6g}, less than 1; raise max_share"
                )
        return self

    @model_validator(mode="after")
    def _epochs_have_a_default(self) -> "DataConfig":
        if self.policy.guard.max_epochs is not None:
            for source in self.sources:
                if source.max_epochs is None:
                    source.max_epochs = self.policy.guard.max_epochs
        return self


def band_names(source: SourceConfig) -> list[str]:
    """Names of the bands that a source will be split into, easiest first; none without `bands`."""
    return [] if source.bands is None else [f"{source.name}.{number + 1}" for number in range(source.bands.number)]


def share_bounds(config: DataConfig, weights: Mapping[str, float] | None = None) -> tuple[list[int], list[int]]:
    """Least and largest share of every source, in units of 1/ONE; rounded outwards, so that thirds leave room for 1.

    weights: those in force, where they are others than the sources' own."""
    guard = config.policy.guard
    low, high = [], []
    for source in config.sources:
        weight = source.weight if weights is None else weights.get(source.name, 0.0)
        least = source.min_share if source.min_share is not None else guard.min_share if weight > 0 else 0.0
        low.append(math.floor(least * ONE))
        high.append(math.ceil((guard.max_share if source.max_share is None else source.max_share) * ONE))
    return low, high


def check_horizon(data: DataConfig, listens: bool) -> None:
    """Raise ConfigError when what training reports would come too late for the step that it is to shape.

    `listens`: whether a policy hears reports. They are waited for, which would never end if training waited for that
    step: horizon > prefetch. That files joined or a limit was reached is not waited for, so its step must be one that
    no rank can have begun; besides the `prefetch` steps that are ready one more may be in the making.
    """
    horizon, ahead, what = data.policy.horizon, data.prefetch, "data.prefetch"
    if any(source.watch or source.max_epochs for source in data.sources):
        if data.prefetch:
            ahead, what = ahead + 1, "data.prefetch + 1, for sources with watch or max_epochs"
    elif not listens:
        return
    if horizon <= ahead:
        raise ConfigError(f"data.policy.horizon: {horizon} must be larger than {ahead} ({what})")
