"""Sources with `bands` become their bands before a run begins; from there on a band is a source like any other.

    config: web {bands: {by: quality, count: 4}}, code
      │  measured once (`band_edges`), or read from the journal when the run has begun
      ▼
    config: web.1, web.2, web.3, web.4, code           journaled as the run's configuration, edges included

So a resumed run, a replay and a run that goes on from another data-parallel size tell records apart by the very numbers
the run began with, whatever has happened to the files. The policy `pacing` says when which band is drawn from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from data_scheduler.band_edges import measure
from data_scheduler.bands import base_name, part_of, split
from data_scheduler.config import BandConfig, BandsConfig, DataConfig, SourceConfig, share_bounds
from data_scheduler.identity import beginning, source_configs
from data_scheduler.journal import Journal
from data_scheduler.layout_index import LayoutIndex
from data_scheduler.manifest import Manifest
from data_scheduler.mixture import ONE
from data_scheduler.stage_config import Stage
from headrace.errors import ConfigError


def banded(config: DataConfig, journal: Journal | None = None, *, measuring: bool = True) -> DataConfig:
    """The configuration with each band in the place of a source with `bands`; itself where there are none.

    Edges come from the journal where the source has entered its run, and are measured otherwise; without `measuring`
    such a source is left as it is. Raises ConfigError when bands contradict the journal, cannot be measured, or leave
    no room for the guard's least shares.
    """
    if all(source.bands is None and source.band is None for source in config.sources):
        return config
    known = _journaled(journal)
    index = LayoutIndex(config.cache_folder() / "index.sqlite")
    parts: dict[str, list[SourceConfig]] = {}
    for source in config.sources:
        if source.bands is None:
            _check_band(source, known)
            parts[source.name] = [source]
            continue
        if source.name in known:
            raise ConfigError(f"data.sources.{source.name}.bands: the source entered the run without; keep it so")
        band = next((band for band in known.values() if band is not None and band.of == source.name), None)
        if band is not None:
            _check_same(source, source.bands, band)
        elif measuring:
            band = measure(source, Manifest.take(source, index))
        parts[source.name] = [source] if band is None else list(split(source, band))
    sources = [part for own in parts.values() for part in own]
    config = config.model_copy(update={"sources": sources, "stages": _staged(config.stages, parts)})
    if measuring:
        low, _ = share_bounds(config)
        if sum(low) > ONE:
            raise ConfigError(
                f"data.policy.guard.min_share: of each of {len(low)} sources, bands included, it is "
                f"{sum(low) / ONE:.6g} in all, more than 1; lower it"
            )
    return config


def _staged(stages: Sequence[Stage], parts: Mapping[str, Sequence[SourceConfig]]) -> list[Stage]:
    """The stages with the weight of a source that was split divided among its bands, by their parts of its text."""
    return [
        stage
        if stage.weights is None
        else stage.model_copy(
            update={
                "weights": {
                    part.name: weight if len(parts[name]) == 1 else weight * part_of(part)
                    for name, weight in stage.weights.items()
                    for part in parts[name]
                }
            }
        )
        for stage in stages
    ]


def take_manifests(sources: Sequence[SourceConfig], index: LayoutIndex) -> dict[str, Manifest]:
    """Look at the sources' files now; the bands of a source are given the same ones, so that no record is in none.

    Raises as `Manifest.take`.
    """
    taken: dict[str, Manifest] = {}
    for source in sources:
        base = base_name(source)
        if base not in taken:
            taken[base] = Manifest.take(source, index)
    return {source.name: replace(taken[base_name(source)], source=source.name) for source in sources}


def _journaled(journal: Journal | None) -> dict[str, BandConfig | None]:
    """The sources of the run so far, and which of them are bands."""
    if journal is None or not journal.events:
        return {}
    beginning(journal)
    bands = {source["name"]: source.get("band") for source in source_configs(journal)}
    return {name: None if band is None else BandConfig.model_validate(band) for name, band in bands.items()}


def _check_band(source: SourceConfig, known: Mapping[str, BandConfig | None]) -> None:
    """Raise ConfigError when a band is not as it entered the run."""
    if source.name in known and source.band != known[source.name]:
        raise ConfigError(
            f"data.sources.{source.name}.band is not what it was when the source entered the run; "
            "add changed data as a new source"
        )


def _check_same(source: SourceConfig, bands: BandsConfig, band: BandConfig) -> None:
    """Raise ConfigError when `bands` asks for others than the run has."""
    same = bands.count == len(band.shares) if band.measured else bands.edges == band.edges
    if (bands.by, bands.order, same) != (band.by, band.order, True):
        edges = ", ".join(f"{edge:g}" for edge in band.edges)
        raise ConfigError(
            f"data.sources.{source.name}.bands: the run has {len(band.shares)} bands by {band.by}, {band.order}, "
            f"{'measured' if band.measured else 'given'} edges {edges}; keep them, or start a new run folder"
        )
