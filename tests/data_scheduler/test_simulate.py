"""A simulated run draws what a real one draws, step by step; its estimates are near what the data really holds."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Scheduler, token_estimate
from data_scheduler.assumed_losses import FLAT_LOSS, RecordedLosses
from data_scheduler.dry_run import DryRun
from data_scheduler.encoder import load_encoder
from data_scheduler.manifest import Manifest
from data_scheduler.replay import ledger
from data_scheduler.simulate import Volume, estimate_sources, simulate
from data_scheduler.token_estimate import WHOLE_BYTES, TokenEstimate, estimate_tokens
from headrace.errors import ConfigError

Make = Callable[..., DataConfig]

PLUGIN = '''
class Harder:
    """Shares in proportion to the losses heard last."""

    uses_feedback = True

    def __init__(self, initial):
        self._weights = dict(initial)

    def weights(self, step, feedback):
        for report in feedback:
            self._weights |= {name: self._weights[name] * loss for name, loss in report.source_loss.items()}
            total = sum(self._weights.values())
            self._weights = {name: weight / total for name, weight in self._weights.items()}
        return self._weights

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
'''
SCHEDULE = {
    "kind": "schedule",
    "options": {"stages": [{"from_step": 7, "weights": {"c": 3, "d": 1}}, {"from_step": 19, "weights": {"a": 1}}]},
}


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside ours with a policy `harder` that listens to losses."""
    package = tmp_path / "site" / "harder-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: harder\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[headrace.policies]\nharder = harder_policy:Harder\n")
    (package.parent / "harder_policy.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(package.parent))


def volumes(config: DataConfig, tokens: float = 1e9) -> list[Volume]:
    """Sources without an end."""
    return [Volume(TokenEstimate(s.name, 10**9, tokens, 0.0, 4.0, 1000, "given")) for s in config.sources]


def real(config: DataConfig, steps: int, losses: RecordedLosses | None = None) -> tuple[list[list[int]], Scheduler]:
    """(sequences per source of each step, the scheduler after them) of a real run, fed back as a trainer does."""
    scheduler = Scheduler(config)
    drawn = []
    for step in range(steps):
        batch = next(scheduler)
        counts = np.bincount(batch.source_ids, minlength=len(scheduler.names)).tolist()
        drawn.append(counts)
        through = [name for name, done in zip(scheduler.names, batch.exhausted, strict=True) if done]
        given = [name for name, count in zip(scheduler.names, counts, strict=True) if count]
        reported = losses.at(step) if losses else dict.fromkeys(scheduler.names, FLAT_LOSS)
        tokens = dict(zip(scheduler.names, (count * config.seq_len for count in counts), strict=True))
        scheduler.feedback(step, {n: reported[n] for n in given}, {n: tokens[n] for n in given}, through)
    return drawn, scheduler


@pytest.mark.parametrize("policy", [{}, SCHEDULE], ids=["static", "schedule"])
def test_counts_are_those_of_a_real_run(data_config: Make, policy: dict[str, Any]) -> None:
    config = data_config(policy=policy, global_batch_size=7, lanes=24)
    expected, _ = real(config, 40)
    dry = iter(DryRun(config))
    assert [next(dry).counts.tolist() for _ in range(40)] == expected
    simulation = simulate(config, volumes(config), 40)
    assert [source.sequences for source in simulation.sources] == np.sum(expected, axis=0).tolist()
    shares = np.cumsum(expected, axis=0) / (7 * np.arange(1, 41))[:, None]
    np.testing.assert_allclose(simulation.realised, shares)
    assert simulation.most_owed < 1


def test_a_policy_that_listens_is_told_losses(data_config: Make, listening: None) -> None:
    config = data_config(policy={"kind": "harder", "horizon": 3})
    flat = simulate(config, volumes(config), 30)
    assert [source.sequences for source in flat.sources] == np.sum(real(config, 30)[0], axis=0).tolist()
    assert flat.losses is not None
    assert "flat" in flat.losses
    recorded = [(step, {"a": 2.0, "b": 4.0 - 0.1 * step, "c": math.nan}) for step in range(0, 20, 2)]
    losses = RecordedLosses(recorded, list("abcd"), "runs/earlier")
    assert losses.at(7) == {"a": 2.0, "b": pytest.approx(3.4), "c": pytest.approx(2.7), "d": pytest.approx(2.7)}
    expected, _ = real(config, 30, losses)
    dry = iter(DryRun(config, losses=losses))
    assert [next(dry).counts.tolist() for _ in range(30)] == expected
    told = simulate(config, volumes(config), 30, losses)
    assert told.losses == "the losses of runs/earlier"
    assert [s.sequences for s in told.sources] != [s.sequences for s in flat.sources]
    assert any("no loss was recorded of c, d" in note for note in told.notes)
    assert any("end at step 18" in note for note in told.notes)


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "proportional"},
        {"kind": "unimax", "options": {"max_epochs": 2.0}},
        {"kind": "schedule", "options": {"stages": [{"from_share": 0.5, "weights": {"b": 1.0}}], "shape": "linear"}},
        {"kind": "odm", "options": {"warmup_steps": 5}, "guard": {"max_change": 0.02, "min_share": 0.05}},
    ],
    ids=lambda policy: policy["kind"],
)
def test_sizes_lengths_and_guard_rails_are_those_of_the_run(
    data_config: Make, policy: dict[str, Any], tmp_path: Path
) -> None:
    config = data_config(policy=policy | {"horizon": 3}, global_batch_size=7, lanes=24)
    simulation = simulate(config, estimate_sources(config), 40)
    scheduler = Scheduler(config, run_steps=40)
    drawn = np.zeros(4, np.int64)
    for step in range(40):
        counts = np.bincount(next(scheduler).source_ids, minlength=4)
        drawn += counts
        given = [name for name, count in zip("abcd", counts, strict=True) if count]
        scheduler.feedback(step, dict.fromkeys(given, FLAT_LOSS), dict.fromkeys(given, 64))
    assert [source.sequences for source in simulation.sources] == drawn.tolist()


# -- sources that end ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def capped(data_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Two small sources, seen twice and once at most, and two that do not end."""
    root = tmp_path_factory.mktemp("capped")
    for name, count in (("small", 240), ("once", 700), ("large", 3000), ("other", 3000)):
        (root / f"{name}.jsonl").write_bytes(jsonl(make_documents(name, count, 0)))

    def make(**changes: Any) -> DataConfig:
        sources = [
            {"name": name, "paths": [str(root / f"{name}.jsonl")], "weight": weight, "max_epochs": limit}
            for name, weight, limit in (("small", 4.0, 2), ("once", 2.0, 1), ("large", 3.0, None), ("other", 1.0, None))
        ]
        return data_config(**{"sources": sources, "lanes": 12, "global_batch_size": 12, "chunk_bytes": 2048} | changes)

    return make


def given_by_lanes(scheduler: Scheduler, source: int) -> Any:
    return np.asarray(scheduler.state_dict()["given"])[:, source, 1]


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([6, 12, 24, 60]), st.sampled_from(["split", "best_fit"]), st.integers(3, 9))
def test_with_known_capacities_the_end_of_sources_is_exact(
    capped: Make, batch: int, packing: str, horizon: int
) -> None:
    config = capped(global_batch_size=batch, packing=packing, policy={"horizon": horizon}, seed=horizon)
    steps = 220 * 12 // batch
    expected, scheduler = real(config, steps)
    caps = {event.data["source"]: (event.data["reported"], event.step) for event in scheduler.journal.of("capped")}
    assert set(caps) == {"small", "once"}
    run = DryRun(config, {name: given_by_lanes(scheduler, scheduler.names.index(name)) for name in caps})
    dry = iter(run)
    assert [next(dry).counts.tolist() for _ in range(steps)] == expected
    assert {name: [(cap.reported, cap.step) for cap in found] for name, found in run.plan.capped.items()} == {
        name: [cap] for name, cap in caps.items()
    }


def test_the_share_of_a_source_that_is_through_goes_to_the_others(capped: Make) -> None:
    config = capped()
    simulation = simulate(config, estimate_sources(config), 400)
    ends = {source.source: source.end for source in simulation.sources}
    assert ends["large"] is None
    assert simulation.sources[2].first_lane_through is None
    small, once = ends["small"], ends["once"]
    assert small is not None
    assert once is not None
    assert small.through == small.without - config.policy.horizon
    first_lane = simulation.sources[0].first_lane_through
    assert first_lane is not None
    assert 0 < first_lane <= small.through
    early = simulate(config, estimate_sources(config), first_lane + 1)
    assert early.sources[0].end is None
    assert any(f"from step {first_lane} on some lanes are through" in line for line in early.warnings())
    first, second = (small, once) if small.without <= once.without else (once, small)
    own = {"small": 0.4, "once": 0.2, "large": 0.3, "other": 0.1}
    gone = own.pop("small" if first is small else "once")
    assert first.handed_to == pytest.approx({name: gone * share / (1 - gone) for name, share in own.items()})
    assert second.handed_to["large"] == pytest.approx(3 * second.handed_to["other"])
    after = second.without
    drawn = np.diff(simulation.realised[[after - 1, 399]] * [[after], [400]], axis=0)[0]
    np.testing.assert_allclose(drawn / drawn.sum(), [0, 0, 0.75, 0.25], atol=1 / (400 - after))
    warnings = simulation.warnings()
    assert any(line.startswith("small: through at step") and "large +" in line for line in warnings)


def test_predicted_ends_are_near_the_real_ones(capped: Make) -> None:
    config = capped()
    simulation = simulate(config, estimate_sources(config), 220)
    _, scheduler = real(config, 220)
    for event in scheduler.journal.of("capped"):
        end = next(source.end for source in simulation.sources if source.source == event.data["source"])
        assert end is not None
        assert end.through == pytest.approx(event.data["reported"], rel=0.2)  # of some 50 steps


def test_a_run_without_data_left_ends(capped: Make) -> None:
    sources = [source.model_copy(update={"max_epochs": 1}) for source in capped().sources]
    config = capped().model_copy(update={"sources": sources})
    simulation = simulate(config, estimate_sources(config), 5000)
    assert 50 < simulation.steps < 2000
    assert len(simulation.at) == len(simulation.realised) == len(simulation.epochs) > 50
    assert f"the run ends at step {simulation.steps:,} of 5,000" in simulation.warnings()[-1]
    json.dumps(simulation.to_data(), allow_nan=False)


# -- epochs ----------------------------------------------------------------------------------------------------------


def test_epochs_are_those_of_a_real_run(data_config: Make, tmp_path: Path) -> None:
    """On small plain files, all encoded, what is left is that lanes do not stand at the same place of an epoch."""
    config = data_config(sources=[s.model_dump() for s in data_config().sources if s.name in "ad"], lanes=6)
    simulation = simulate(config, estimate_sources(config), 60)
    scheduler = Scheduler(config, run_dir=tmp_path)
    for _ in range(60):
        next(scheduler)
    _, rows = ledger(tmp_path, 60)
    for source, row in zip(simulation.sources, rows, strict=True):
        assert (source.sequences, source.tokens) == (row.sequences, row.tokens)
        assert source.share_asked == pytest.approx(row.share_asked)
        assert source.epochs == pytest.approx(row.epochs, rel=0.07)
        assert source.epochs is not None
        assert list(source.epochs_passed) == [2**power for power in range(1 + int(math.log2(source.epochs)))]
    a = simulation.sources[0]
    assert a.estimate.error == 0
    at_4 = a.epochs_passed[4]
    assert simulation.epochs[at_4 - 1, 0] < 4 <= simulation.epochs[at_4, 0]
    assert any(f"a: {a.epochs:.1f} epochs, more than 4 from step {at_4}" in line for line in simulation.warnings())


def true_tokens(config: DataConfig, texts: list[str]) -> int:
    encoder = load_encoder(config.tokenizer)
    return sum(len(encoder.encode(text)) + 1 for text in texts)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_tokens_are_estimated_from_a_sample(
    data_config: Make, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four files of different density, 4 MB: from some 250 KB, within the error that is said."""
    monkeypatch.setattr(token_estimate, "DECODED_BYTES", 2 << 20)  # half of each compressed file
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: list[str] = []
    for number in range(4):
        some = [f"{'0123456789' * (number * n % 4)} {text}" for n, text in enumerate(make_documents("x", 9000, number))]
        path = tmp_path / f"{number}.{suffix}"
        data = b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(some))
        if suffix == "parquet":
            pq.write_table(pa.table({"id": range(len(some)), "text": some}), path, row_group_size=1000)
        else:
            path.write_bytes(zstandard.compress(data) if suffix.endswith("zst") else data)
        texts += some
    config = data_config(sources=[{"name": "x", "paths": [str(tmp_path)]}])
    source = config.sources[0]
    estimate = estimate_tokens(config, source, Manifest.take(source), load_encoder(config.tokenizer))
    assert 0 < estimate.error < 0.2
    assert estimate.sampled_bytes < 2 * WHOLE_BYTES
    assert estimate.tokens == pytest.approx(true_tokens(config, texts), rel=1.5 * estimate.error)


def test_one_long_line_and_a_filter_that_leaves_nothing(data_config: Make, tmp_path: Path) -> None:
    long = "water wheel " * 100_000
    (tmp_path / "long.jsonl").write_bytes(jsonl([long]))
    sources = [
        {"name": "long", "paths": [str(tmp_path / "long.jsonl")], "max_epochs": 1},
        {"name": "none", "paths": [str(tmp_path / "long.jsonl")], "where": "lang == 'de'", "max_epochs": 1},
    ]
    config = data_config(sources=sources)
    long_one, none = (volume.estimate for volume in estimate_sources(config))
    assert long_one.tokens == pytest.approx(true_tokens(config, [long]), rel=0.02)
    assert (none.tokens, none.why) == (0.0, "no document in the sample")
    simulation = simulate(config, estimate_sources(config), 5)
    assert simulation.sources[1].epochs is None
    assert any("epochs are not known" in note for note in simulation.notes)
    json.dumps(simulation.to_data(), allow_nan=False)


# -- what is said ----------------------------------------------------------------------------------------------------


def test_shares_that_give_nothing_are_named(data_config: Make) -> None:
    sources = [
        source.model_copy(update={"weight": w})
        for source, w in zip(data_config().sources, (1, 1e-6, 0, 1), strict=True)
    ]
    config = data_config().model_copy(update={"sources": sources})
    warnings = simulate(config, volumes(config), 100).warnings()
    assert warnings == [
        "b: a share of 5e-07 over 100 steps is 0.0012 sequences, under one",
        "c: weight 0 in every step, nothing is drawn",
    ]


def test_long_runs_are_thinned_for_plots(data_config: Make) -> None:
    config = data_config(global_batch_size=1)
    simulation = simulate(config, volumes(config), 5003)
    assert len(simulation.at) == 2000
    assert (simulation.at[0], simulation.at[-1]) == (0, 5002)
    np.testing.assert_allclose(simulation.realised[-1], [0.4, 0.3, 0.2, 0.1], atol=1 / 5000)
    assert (np.abs(simulation.realised - simulation.asked) * (simulation.at + 1)[:, None]).max() < 1


def test_what_cannot_be_simulated_is_said(data_config: Make) -> None:
    config = data_config()
    with pytest.raises(ConfigError, match="steps: 0"):
        simulate(config, volumes(config), 0)
    with pytest.raises(ConfigError, match="no policy 'nope'"):
        simulate(data_config(policy={"kind": "nope"}), volumes(config), 1)
    with pytest.raises(ConfigError, match="runs/x: no loss of a, b, c, d there"):
        RecordedLosses([(0, {"elsewhere": 1.0})], config.sources and list("abcd"), "runs/x")
    sources = [config.sources[0].model_copy(update={"max_epochs": 1}), *config.sources[1:]]
    with pytest.raises(ConfigError, match="horizon"):
        simulate(config.model_copy(update={"sources": sources, "prefetch": 8}), volumes(config), 1)
