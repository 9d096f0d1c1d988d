"""A checkpoint of any layout goes on under any other: the same next losses, so the same weights and optimizer state.

Loss of the step after loading is a function of the weights alone; that of the step after it also of Adam's moments,
of their step and of the fp32 weights. The figures go into `docs/parallel.md`, see `benchmarks/parallel_equivalence.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_matrix import EVERY, LAYOUTS, VARIANTS, Entry, matrix_state, steps_of
from process_group import run_ranks
from tiny_run import BATCH

from data_scheduler.state import State
from parallel import process_groups
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Progress

SAVED_AT, STEPS = 3, 5
TOLERANCE = 1e-6
GATED_TIED = next(v for v in VARIANTS if v["family"] == "llama" and v["tie_embeddings"] and v["num_query_groups"] < 8)
BIASES_UNTIED = next(v for v in VARIANTS if v["family"] == "wonton" and not v["tie_embeddings"] and v["qk_norm"])
Curve = list[tuple[float, float]]
"""(loss, gradient norm) of the steps after the checkpoint."""

NAMES = list(LAYOUTS)


def curve(state: Any) -> Curve:
    return [(result.loss, result.grad_norm) for result in steps_of(state, SAVED_AT, STEPS)]


def save_and_go_on(entry: Entry, variant: dict[str, Any], run_dir: Path) -> Curve:
    ranks = process_groups.initialize(entry.layout, seed=1, timeout_s=120)
    state = matrix_state({**variant, **entry.model}, entry.layout, ranks)
    steps_of(state, 0, SAVED_AT)
    data_state = State.fresh(BATCH, ["code", "prose"]).to_dict(0, 1)
    Checkpoints(run_dir).save(state, data_state, Progress(SAVED_AT, 0))
    return curve(state)


def load_and_go_on(entry: Entry, variant: dict[str, Any], run_dirs: list[Path]) -> list[Curve]:
    ranks = process_groups.initialize(entry.layout, seed=1, timeout_s=120)
    found = []
    for run_dir in run_dirs:
        state = matrix_state({**variant, **entry.model}, entry.layout, ranks)
        progress, _ = checkpoint.load(Checkpoints(run_dir).path(SAVED_AT), state)
        assert progress.step == SAVED_AT
        found.append(curve(state))
    return found


Saved = Callable[[str, dict[str, Any]], tuple[Path, Curve]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(run folder with a checkpoint, how its run went on) of a layout; made when first asked for."""
    made: dict[tuple[str, str], tuple[Path, Curve]] = {}

    def make(name: str, variant: dict[str, Any]) -> tuple[Path, Curve]:
        key = (name, variant["family"])
        if key not in made:
            folder, entry = tmp_path_factory.mktemp("saved"), LAYOUTS[name]
            made[key] = folder, run_ranks(entry.layout.world_size, save_and_go_on, entry, variant, folder)[0]
        return made[key]

    return make


def sources_of(name: str) -> list[str]:
    """The layouts whose checkpoints `name` loads: of the same model, so with the same experts."""
    alike = [other for other in NAMES if LAYOUTS[other].model == LAYOUTS[name].model]
    if EVERY:
        return alike
    at = alike.index(name)
    return list(dict.fromkeys(alike[(at + jump) % len(alike)] for jump in (1, 5, 9)))


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_any_layout_goes_on_under_this_one(
    name: str, saved: Saved, record_property: Callable[[str, object], None]
) -> None:
    others = sources_of(name)
    check(name, others, GATED_TIED, saved, record_property)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [name for name in NAMES if not LAYOUTS[name].model][::4])
def test_biases_and_an_untied_head_go_along(name: str, saved: Saved) -> None:
    others = sources_of(name)[:1]
    check(name, others, BIASES_UNTIED, saved, lambda *_: None)


def check(
    name: str, others: list[str], variant: dict[str, Any], saved: Saved, record: Callable[[str, object], None]
) -> None:
    entry = LAYOUTS[name]
    folders = [saved(other, variant) for other in others]
    found = run_ranks(
        entry.layout.world_size, load_and_go_on, entry, variant, [folder for folder, _ in folders], timeout_s=300
    )[0]
    record("layout", name)
    for other, (_, uninterrupted), here in zip(others, folders, found, strict=True):
        worst = max(abs(mine[0] / theirs[0] - 1) for mine, theirs in zip(here, uninterrupted, strict=True))
        record(other, f"{worst:.2e}")
        assert worst <= TOLERANCE, f"{other} -> {name}: loss"
        for mine, theirs in zip(here, uninterrupted, strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5), f"{other} -> {name}: gradient norm"


def test_by_default_every_layout_is_loaded_by_some_other() -> None:
    for name in NAMES:
        alike = [other for other in NAMES if LAYOUTS[other].model == LAYOUTS[name].model]
        assert len(alike) == 1 or any(name in sources_of(other) for other in alike if other != name)
