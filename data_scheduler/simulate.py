"""What a run will draw from each source, before it is started: shares exactly, epochs as estimates.

    estimates = estimate_sources(config)                  # looks at 256 KB of each source
    simulation = simulate(config, estimates, steps=10_000)
    simulation.sources[0].share_realised, simulation.sources[0].epochs

Worked example: `code` holds an estimated 1.6 M tokens and gets 0.4 of 850 steps of 4 sequences of 257 tokens. It gives
1,360 sequences, exactly; 350,000 tokens, so 0.22 epochs, give or take what the estimate is off.

`dry_run` takes the steps, `token_estimate` says how much a source holds; here both are put together.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_scheduler.assumed_losses import AssumedLosses, FlatLosses, RecordedLosses
from data_scheduler.bands import part_of
from data_scheduler.config import DataConfig
from data_scheduler.dry_run import DryRun
from data_scheduler.encoder import load_encoder
from data_scheduler.layout_index import LayoutIndex
from data_scheduler.manifest import Manifest
from data_scheduler.mixture import ONE
from data_scheduler.order import Int64
from data_scheduler.policies.context import SourceSize
from data_scheduler.progress import Task
from data_scheduler.source import SourceReader
from data_scheduler.stages import Turn, policy_of, turns
from data_scheduler.timeline import Timeline
from data_scheduler.token_estimate import TokenEstimate, estimate_tokens
from data_scheduler.unit_cache import UnitCache
from headrace.errors import ConfigError

Floats = npt.NDArray[np.float64]
POINTS = 2000
"""Steps of which shares are kept, for plots; a plot is some 1,500 pixels wide."""
BLOCK = 1000
"""Steps summed up in one go."""
NAMED = 4
"""Sources named in a line; there may be fifty."""
MANY_EPOCHS = 4
"""Up to as many, repeated data is worth nearly as much as new data; later ever less (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Volume:
    """What a source holds."""

    estimate: TokenEstimate
    lane_bytes: Int64 | None = None
    """Of a source with `max_epochs`: text dealt to each lane in that many epochs, int64[lanes], bytes."""

    def capacities(self) -> Int64:
        """Tokens that each lane can give, int64[lanes]."""
        assert self.lane_bytes is not None, "asked of sources with max_epochs only"
        return (self.lane_bytes * (self.estimate.tokens / max(1, self.estimate.text_bytes))).astype(np.int64)


@dataclass(frozen=True)
class End:
    """How a source with `max_epochs` ends."""

    max_epochs: int
    through: int
    """Step in which the last lane is found to be through."""
    without: int
    """First step that is planned without the source."""
    handed_to: dict[str, float]
    """What each other source gains in share there: in proportion to the shares they had."""


@dataclass(frozen=True)
class SourceOutcome:
    """One source's part in the run."""

    source: str
    weight: float
    """As configured."""
    max_epochs: int | None
    share_asked: float
    """Mean of the policy's shares over the run's tokens."""
    share_realised: float
    sequences: int
    tokens: int
    """`seq_len + 1` for each sequence, as `headrace data ledger` counts."""
    epochs: float | None
    """None: not known, no document was found in the sample."""
    epochs_error: float | None
    """Twice the standard error of `epochs`; None: not known."""
    epochs_passed: dict[int, int]
    """1, 2, 4, … epochs → the step in which as many are passed."""
    first_lane_through: int | None
    """Step in which a first lane is through and gives sequences of other sources in its place; None: none is."""
    end: End | None
    """None: not through within these steps."""
    estimate: TokenEstimate


@dataclass(frozen=True)
class Simulation:
    """A run's mixture, step by step."""

    steps: int
    """Steps that the run does: fewer than `steps_asked` where all data is through before."""
    steps_asked: int
    shapes: list[Turn]
    """Batch shapes: that of the first step, and every later change."""
    policy: str
    losses: str | None
    """What a policy that listens was told; None: it does not listen."""
    most_owed: float
    """Largest |drawn - Σ share·B| of any source after any step, in sequences, before lanes that are through are
    replaced."""
    sources: list[SourceOutcome]
    at: Int64
    """int64[points]: numbers of the steps that the following are of."""
    asked: Floats
    """float64[points, sources]: the policy's share in that step."""
    realised: Floats
    """float64[points, sources]: share of all tokens up to and with that step."""
    epochs: Floats
    """float64[points, sources]: epochs up to and with that step, estimated; NaN where not known."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know about the simulation itself."""

    def to_data(self) -> dict[str, Any]:
        """As plain data, without infinities."""
        points = {
            "step": self.at.tolist(),
            "asked": self.asked.T.round(6).tolist(),
            "realised": self.realised.T.round(6).tolist(),
            "epochs": [[None if math.isnan(e) else round(e, 6) for e in row] for row in self.epochs.T.tolist()],
        }
        own = ("steps", "steps_asked", "policy", "losses", "most_owed", "notes")
        return {
            **{name: getattr(self, name) for name in own},
            "shapes": [{"step": turn.step, **turn.data} for turn in self.shapes],
            "warnings": self.warnings(),
            "sources": [_finite(asdict(source)) for source in self.sources],
            "points": points,
        }

    @property
    def said_shape(self) -> str:
        """Sequences and tokens of a step, for people."""
        first, last = self.shapes[0], self.shapes[-1]
        said = f"{first.global_batch_size:,} x {first.seq_len:,}"
        if len(self.shapes) > 1:
            said += f" to {last.global_batch_size:,} x {last.seq_len:,}"
        return said

    def warnings(self) -> list[str]:
        """What the run's owner may not have meant, a line each."""
        said: list[str] = []
        for source in self.sources:
            said += [f"{source.source}: {problem}" for problem in self._problems(source)]
        if self.steps < self.steps_asked:
            said.append(
                f"the run ends at step {self.steps:,} of {self.steps_asked:,}: every source with a weight will have "
                "been seen max_epochs times"
            )
        return said

    def _problems(self, source: SourceOutcome) -> list[str]:
        said = []
        wanted = source.share_asked * sum(other.sequences for other in self.sources)
        if source.share_asked == 0:
            said.append("weight 0 in every step, nothing is drawn")
        elif wanted < 1:
            said.append(
                f"a share of {source.share_asked:.2g} over {self.steps:,} steps is {wanted:.2g} sequences, under one"
            )
        if source.end is not None:
            most = sorted(source.end.handed_to.items(), key=lambda item: -item[1])
            to = ", ".join(f"{name} +{share:.4f}" for name, share in most[:NAMED]) or "no one"
            if len(most) > NAMED:
                to += f" and {len(most) - NAMED} others"
            said.append(
                f"through at step {source.end.through:,} (max_epochs {source.max_epochs}, estimated); from step "
                f"{source.end.without:,} on its share goes to {to}"
            )
        elif source.first_lane_through is not None:
            said.append(
                f"from step {source.first_lane_through:,} on some lanes are through (max_epochs {source.max_epochs}, "
                "estimated) and give other sources in its place, while others still hold documents"
            )
        if source.epochs is not None and source.epochs > MANY_EPOCHS:
            step = source.epochs_passed[MANY_EPOCHS]
            said.append(
                f"{source.epochs:.1f} epochs, more than {MANY_EPOCHS} from step {step:,} on; from there "
                "repeated data is worth ever less (arXiv 2305.16264)"
            )
        return said


def estimate_sources(config: DataConfig) -> list[Volume]:
    """Look at a few places of every source, as they would enter a run now. Raises ConfigError or DataError."""
    config = config.model_copy(update={"chunk_bytes": config.settled_chunk_bytes})
    index = LayoutIndex(config.cache_folder() / "index.sqlite")
    manifests = [Manifest.take(source, index) for source in config.sources]
    encoder = load_encoder(config.tokenizer, fast=config.fast_tokenizer)
    found = []
    with Task("looking at sources", len(manifests)) as task:
        for source, manifest in zip(config.sources, manifests, strict=True):
            lane_bytes = None
            if source.max_epochs is not None:
                reader = SourceReader(source, manifest, config, encoder, UnitCache())
                lane_bytes = _lane_bytes(reader, source.max_epochs)
            found.append(Volume(estimate_tokens(config, source, manifest, encoder), lane_bytes))
            task.advance()
    return found


def _lane_bytes(reader: SourceReader, epochs: int) -> Int64:
    """Text that each lane is dealt in the first epochs, int64[lanes]."""
    sizes = reader.chunks.sizes()
    lanes = range(reader.lanes)
    dealt = [[int(sizes[reader.hand(epoch, lane)].sum()) for lane in lanes] for epoch in range(epochs)]
    total: Int64 = np.array(dealt, np.int64).sum(axis=0)
    return total


def simulate(
    config: DataConfig, volumes: Sequence[Volume], steps: int, losses: AssumedLosses | None = None
) -> Simulation:
    """The first `steps` steps of a run with this configuration. `volumes`: one per source, in order.

    A pure function. Raises ConfigError for a policy, options or weights that cannot be used, or steps below 1.
    """
    if steps < 1:
        raise ConfigError(f"steps: {steps} cannot be simulated; give at least 1")
    names = [source.name for source in config.sources]
    losses = losses or FlatLosses(names)
    capacities = {
        source.name: volume.capacities()
        for source, volume in zip(config.sources, volumes, strict=True)
        if volume.lane_bytes is not None and volume.estimate.tokens
    }
    sizes = {
        source.name: SourceSize(int(volume.estimate.text_bytes * part_of(source)), volume.estimate.tokens)
        for source, volume in zip(config.sources, volumes, strict=True)
    }
    run = DryRun(config, capacities, losses, sizes, steps)
    per_epoch = np.array([volume.estimate.tokens or math.nan for volume in volumes])
    sums = _Sums(steps, per_epoch)
    with Task("simulating", steps) as task:
        draws = itertools.islice(run, steps)
        while block := list(itertools.islice(draws, BLOCK)):
            widths = np.array([draw.seq_len + 1 for draw in block])
            asked, counts, owed = (np.array([draw[part] for draw in block]) for part in (1, 3, 4))
            sums.add(asked, counts, owed, widths)
            task.advance(len(block))
    drawn = np.array(sums.drawn_at).reshape(-1, len(names))
    asked = np.array(sums.asked_at).reshape(-1, len(names)) / ONE
    at = sums.points[: len(drawn)]
    return Simulation(
        steps=sums.steps,
        steps_asked=steps,
        shapes=[turn for turn in turns(config, steps, Timeline()) if turn.step < steps],
        policy=_policies(config),
        losses=losses.said if run.listens else None,
        most_owed=sums.most_owed / ONE,
        sources=[_outcome(run, number, volume, sums, at, asked) for number, volume in enumerate(volumes)],
        at=at,
        asked=asked,
        realised=drawn / drawn.sum(axis=1)[:, None],
        epochs=drawn / per_epoch,
        notes=_notes(run, losses, volumes, sums.steps),
    )


class _Sums:
    """What is kept of the steps."""

    def __init__(self, steps: int, per_epoch: Floats) -> None:
        """per_epoch: float64[sources], tokens in an epoch; NaN where not known."""
        self.points = np.unique(np.linspace(0, steps - 1, POINTS).astype(np.int64))
        self.steps = 0
        self.sequences = np.zeros(len(per_epoch), np.int64)
        self.drawn = np.zeros(len(per_epoch), np.int64)
        """Tokens."""
        self.asked = np.zeros(len(per_epoch))
        """Tokens that the asked shares were of."""
        self.most_owed = 0
        self.asked_at: list[Int64] = []
        self.drawn_at: list[Int64] = []
        self.passed: list[dict[int, int]] = [{} for _ in per_epoch]
        self._per_epoch = per_epoch

    def add(self, asked: Int64, counts: Int64, owed: Int64, widths: Int64) -> None:
        """Take in the next steps; all int64[steps, sources], `widths` int64[steps]: tokens of a sequence."""
        tokens = counts * widths[:, None]
        drawn = self.drawn + tokens.cumsum(axis=0)
        kept = self.points[len(self.asked_at) :] - self.steps
        kept = kept[kept < len(counts)]
        self.asked_at += list(asked[kept])
        self.drawn_at += list(drawn[kept])
        for source, passed in enumerate(self.passed):
            epochs = 2 ** len(passed)
            while drawn[-1, source] >= epochs * self._per_epoch[source]:
                passed[epochs] = self.steps + int(drawn[:, source].searchsorted(epochs * self._per_epoch[source]))
                epochs *= 2
        self.most_owed = max(self.most_owed, int(np.abs(owed).max()))
        self.asked += (asked / ONE * tokens.sum(axis=1)[:, None]).sum(axis=0)
        self.sequences += counts.sum(axis=0)
        self.drawn = drawn[-1]
        self.steps += len(counts)


def _outcome(run: DryRun, number: int, volume: Volume, sums: _Sums, at: Int64, asked: Floats) -> SourceOutcome:
    """One source's part. `at`, `asked`: the mixture at some steps."""
    source, estimate = run.config.sources[number], volume.estimate
    tokens = int(sums.drawn[number])
    epochs = tokens / estimate.tokens if estimate.tokens else None
    return SourceOutcome(
        source=source.name,
        weight=source.weight,
        max_epochs=source.max_epochs,
        share_asked=float(sums.asked[number]) / max(1, int(sums.drawn.sum())),
        share_realised=tokens / max(1, int(sums.drawn.sum())),
        sequences=int(sums.sequences[number]),
        tokens=tokens,
        epochs=epochs,
        epochs_error=None if epochs is None or math.isinf(estimate.error) else epochs * estimate.error,
        epochs_passed=sums.passed[number],
        first_lane_through=run.first_through.get(source.name),
        end=_end(run, number, at, asked),
        estimate=estimate,
    )


def _end(run: DryRun, number: int, at: Int64, asked: Floats) -> End | None:
    """How a source ended, if it did. `at`, `asked`: the mixture at some steps."""
    name = run.names[number]
    cap = next(iter(run.plan.capped.get(name, [])), None)
    if cap is None:
        return None
    # Where the run ends before that step, the shares of its last one.
    shares = asked[min(int(at.searchsorted(cap.step)), len(at) - 1)].copy()
    order = list(run.plan.capped)
    shares[[run.names.index(before) for before in order[: order.index(name)]]] = 0
    own, others = shares[number], shares.sum() - shares[number]
    to = {
        other: float(share * own / others / (own + others))
        for other, share in zip(run.names, shares.tolist(), strict=True)
        if share and other != name
    }
    return End(cap.max_epochs, cap.reported, cap.step, to)


def _policies(config: DataConfig) -> str:
    """The policies of a run, in the order of their stages."""
    kinds = [policy_of(config, stage)["kind"] for stage in (None, *range(len(config.stages)))]
    return ", then ".join(kind for kind, _ in itertools.groupby(kinds))


def _notes(run: DryRun, losses: AssumedLosses, volumes: Sequence[Volume], steps: int) -> list[str]:
    said = [
        "shares, sequences and tokens are exact as long as no source is through; epochs, and when one is through, rest "
        "on an estimate of the tokens that it holds (± two standard errors)"
    ]
    if run.listens:
        said.append(f"policy {_policies(run.config)!r} listens to losses; it was told {losses.said}")
        if isinstance(losses, RecordedLosses):
            if losses.unknown:
                said.append(f"no loss was recorded of {', '.join(losses.unknown)}: told the mean of the others'")
            if losses.last < steps - 1:
                said.append(f"the losses end at step {losses.last:,}; the last ones hold from there on")
    elif isinstance(losses, RecordedLosses):
        said.append(f"policy {_policies(run.config)!r} does not listen to losses; those given change nothing")
    said += [
        f"{volume.estimate.source}: {volume.estimate.why}; its epochs are not known"
        for volume in volumes
        if not volume.estimate.tokens
    ]
    return said


def _finite(value: Any) -> Any:
    """Plain data with None in the place of infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
