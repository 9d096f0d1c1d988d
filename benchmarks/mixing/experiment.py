"""Arms, learning rates, seeds: the plan of an experiment, and the file of the runs that have ended."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Result = dict[str, Any]
TUNING_SEED = 1000
"""Learning rates are chosen on this one, which none of the runs that count has."""


class Trial(NamedTuple):
    """One run."""

    arm: str
    lr: float
    seed: int


def experiment_options(parser: argparse.ArgumentParser, arms: Sequence[str], seeds: int, quick: str) -> None:
    """The options of every experiment here. `quick`: what is left of it to see that it runs."""
    parser.add_argument("--work", type=Path, help="folder that keeps the corpus and every run that ended")
    parser.add_argument("--quick", action="store_true", help=f"see that it runs: {quick}")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run; all unless told")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"seeds of every arm, {seeds} unless told")


class Experiment:
    """Tune every arm, then run every seed; each run once, whatever was interrupted."""

    def __init__(
        self, work: Path, settings: Result, train: Callable[[Trial], Result], say: Callable[[str], None] = print
    ) -> None:
        """`settings` shape every run; runs kept under other settings do not count."""
        self._file = work / "runs.jsonl"
        self._settings = json.loads(json.dumps(settings))
        self._train, self._say = train, say
        self._done: dict[Trial, Result] = {}
        work.mkdir(parents=True, exist_ok=True)
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            kept = json.loads(line)
            if kept["settings"] == self._settings:
                self._done[Trial(*kept["trial"])] = kept["found"]

    def result(self, trial: Trial) -> Result:
        """What a run found; runs it unless it is kept."""
        if trial not in self._done:
            found = self._train(trial)
            with self._file.open("a") as file:
                file.write(json.dumps({"settings": self._settings, "trial": trial, "found": found}) + "\n")
            self._done[trial] = json.loads(json.dumps(found))
            loss = mean_loss(found)
            self._say(f"{trial.arm:22} lr {trial.lr:g}  seed {trial.seed:4}  loss {loss:.4f}  {found['cpu_s']:.0f} s")
        return self._done[trial]

    def run(self, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Result]:
        """Every arm's part of the result: its learning rates with the losses they gave, and its runs at the best.

        Seeds come one after the other, so that what there is when the time is up compares the arms on the same ones.
        """
        tuned = {arm: [(lr, mean_loss(self.result(Trial(arm, lr, TUNING_SEED)))) for lr in rates] for arm in arms}
        best = {arm: min(found, key=lambda pair: (math.isnan(pair[1]), pair[1]))[0] for arm, found in tuned.items()}
        for seed in seeds:
            for arm in arms:
                self.result(Trial(arm, best[arm], seed))
        return {
            arm: {
                "lr": best[arm],
                "tuning": [{"lr": lr, "mean_val_loss": round(loss, 5)} for lr, loss in tuned[arm]],
                "runs": [{"seed": seed, **self.result(Trial(arm, best[arm], seed))} for seed in seeds],
            }
            for arm in arms
        }


def mean_loss(found: Result) -> float:
    """Mean of the sources' held-out losses after the last step; what learning rates are chosen by."""
    return statistics.fmean(found["val_loss"].values())
