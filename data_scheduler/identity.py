"""What a run's journal says about who it is: the settings and sources it keeps for life."""

from collections.abc import Mapping
from typing import Any

from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.formats.records import Unit
from data_scheduler.journal import Event, Journal
from data_scheduler.manifest import Manifest
from data_scheduler.reading import UnitReader, layout_units
from headrace.errors import ConfigError

FIXED_KEYS = ("seed", "lanes", "packing", "document_start", "document_end", "chunk_bytes")
"""Settings that define what a lane's state means; a run keeps them for life."""
SOURCE_KEYS = (
    "paths", "format", "text_key", "template", "where", "prompt", "masked_key", "loss_weight", "loss_weight_key",
    "max_document_bytes", "transforms", "objectives",
)  # fmt: skip
"""What a source keeps from when it entered the run."""
SAMPLE_BYTES = 4 << 20
"""Sources whose first file is at most this large have some of its documents encoded by both encoders at start."""


def settled(config: DataConfig, begun: Mapping[str, Any] | None) -> DataConfig:
    """The configuration with the numbers that follow from others filled in, or, where it leaves them open, those that
    the run of `begun`, its journaled configuration, began with."""
    left_open = {"lanes", "chunk_bytes"} - {key for key in config.model_fields_set if getattr(config, key) is not None}
    if begun is not None:
        return config.model_copy(update={key: begun[key] for key in sorted(left_open)})
    return config.model_copy(update={"lanes": config.lanes, "chunk_bytes": config.settled_chunk_bytes})


def beginning(journal: Journal) -> Event:
    """The event that a run begins with. Raises ConfigError when the journal's first is another."""
    started = journal.events[0]
    if started.kind != "run_started":
        raise ConfigError(f"{journal.path}: the journal does not begin with run_started; it is not a run's journal")
    return started


def check_same_run(config: DataConfig, journal: Journal, fingerprint: str) -> None:
    """Raise ConfigError when the configuration contradicts what the journal's run has fixed."""
    started = beginning(journal)
    old = started.data["data"]
    for key in FIXED_KEYS:
        asked = getattr(config, key)
        if old[key] != asked:
            raise ConfigError(
                f"data.{key} is {asked!r} but the run in {journal.path} began with {old[key]!r}; "
                "keep it, or start a new run folder"
            )
    objectives = [each.model_dump(mode="json") for each in config.objectives]
    if old.get("objectives", []) != objectives:
        raise ConfigError(
            f"data.objectives are others than the run in {journal.path} began with; keep them, give a new source "
            "`objectives` of its own, or start a new run folder"
        )
    if started.data["tokenizer"] != fingerprint:
        raise ConfigError(
            f"data.tokenizer: {config.tokenizer} is not the tokenizer the run in {journal.path} began with; "
            "use that one, or start a new run folder"
        )
    sources = {source["name"]: source for source in source_configs(journal)}
    names = [source.name for source in config.sources]
    if names[: len(sources)] != list(sources):
        raise ConfigError(
            f"data.sources: the run has {', '.join(sources)} in this order; add new sources after them, and set a "
            "weight to 0 to stop drawing from one"
        )
    for source in config.sources:
        if source.name not in sources:
            continue
        before, now = sources[source.name], source.model_dump(mode="json")
        for key in SOURCE_KEYS:
            if before.get(key, SourceConfig.model_fields[key].default) != now[key]:
                raise ConfigError(
                    f"data.sources.{source.name}.{key} was {before.get(key)!r} when the source entered the run; "
                    "add changed data as a new source"
                )


def sample_texts(config: DataConfig, manifests: Mapping[str, Manifest]) -> list[str]:
    """A few documents of every source whose first file is small, for the check of the fast encoder."""
    samples: list[str] = []
    for source in config.sources:
        path, size = manifests[source.name].files[0]
        if 0 < size <= SAMPLE_BYTES:
            layout = manifests[source.name].row_groups.get(path)
            unit = layout_units(path, source.format, layout)[0] if layout else Unit(path, 0, -1)
            documents = UnitReader(source).read(unit).documents
            samples += [text[:2000] for text in documents[:4] if isinstance(text, str)]
    return samples


def source_configs(journal: Journal) -> list[dict[str, Any]]:
    """The configuration of every source of the run, in order, as the journal knows it."""
    return [*journal.events[0].data["data"]["sources"], *(e.data["source"] for e in journal.of("source_added"))]
