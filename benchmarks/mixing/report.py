"""Tables and pictures of the mixing experiments, from their result files alone; means ± standard errors over seeds."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Rows = list[tuple[str, ...]]
Measure = Callable[[Result], float]
LISTENING = {"skill_it", "skill_it_short", "skill_it_own", "odm", "ado", "aioli"}


def loss(run: Result) -> float:
    """Mean held-out loss of a run's sources, nats a token."""
    return statistics.fmean(run["val_loss"].values())


def accuracy(run: Result) -> float:
    """Mean accuracy of a run's sources, in per cent."""
    return 100 * statistics.fmean(run["accuracy"].values())


def spread(values: list[float]) -> tuple[float, float]:
    """(mean, its standard error); the error of one value is not known: NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def differences(result: Result, arm: str, other: str, measure: Measure) -> list[float]:
    """`arm` less `other`, seed by seed: both saw the same data in their sources and began with the same weights."""
    theirs = {run["seed"]: measure(run) for run in result["arms"][other]["runs"]}
    return [measure(run) - theirs[run["seed"]] for run in result["arms"][arm]["runs"]]


def lego_table(result: Result) -> tuple[tuple[str, ...], Rows]:
    """(head, rows): accuracy of every skill, the mean and how it differs from `random`, the mean loss."""
    names, base = result["settings"]["sources"], _base(result, "random")
    head = ("arm", "learning rate", *(f"`{name}`" for name in names), "mean accuracy", f"against {base}", "mean loss")
    rows = []
    for arm, found in result["arms"].items():
        runs = found["runs"]
        skills = [f"{spread([100 * run['accuracy'][name] for run in runs])[0]:.1f}" for name in names]
        against = "" if arm == base else _said(differences(result, arm, base, accuracy), 1, sign=True)
        total = _said([accuracy(run) for run in runs], 1)
        rows.append((f"`{arm}`", f"{found['lr']:g}", *skills, total, against, _said([loss(run) for run in runs], 3)))
    return head, rows


def text_table(result: Result) -> tuple[tuple[str, ...], Rows]:
    """(head, rows), best first: mean loss, how it differs from `uniform`, loss of every source."""
    names, base = result["settings"]["sources"], _base(result, "uniform")
    head = ("arm", "learning rate", "mean loss", f"against {base}", *(f"`{name}`" for name in names))
    rows = []
    for arm, found in sorted(result["arms"].items(), key=lambda pair: spread([loss(r) for r in pair[1]["runs"]])[0]):
        runs = found["runs"]
        against = "" if arm == base else _said(differences(result, arm, base, loss), 3, sign=True)
        own = [f"{spread([run['val_loss'][name] for run in runs])[0]:.2f}" for name in names]
        rows.append((f"`{arm}`", f"{found['lr']:g}", _said([loss(run) for run in runs], 3), against, *own))
    return head, rows


def _base(result: Result, wanted: str) -> str:
    return wanted if wanted in result["arms"] else next(iter(result["arms"]))


def _said(values: list[float], digits: int, sign: bool = False) -> str:
    mean, error = spread(values)
    return f"{mean:{'+' if sign else ''}.{digits}f}" + ("" if error != error else f" ± {error:.{digits}f}")


def show(result: Result) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    head, rows = lego_table(result) if "own_graph" in result else text_table(result)
    table = Table(title=f"{len(result['settings']['seeds'])} seeds, mean ± standard error", title_justify="left")
    for column, name in enumerate(head):
        table.add_column(name.strip("`"), justify="right" if column else "left")
    for row in rows:
        table.add_row(*(cell.strip("`") for cell in row))
    Console().print(table)


def plot_lego(result: Result, path: Path) -> None:
    """Left the mean held-out loss over the run, right the accuracy of every skill; bars are standard errors."""
    from pretrain.picture import COLOURS, picture

    names, arms = result["settings"]["sources"], list(result["arms"])
    colours = [*COLOURS, "#555555"][: len(arms)]
    # Where every arm was evaluated; a policy may have asked for more. The untrained model's loss would hide the rest.
    evaluated = [{step for step, _ in arm["runs"][0]["curve"]} for arm in result["arms"].values()]
    steps = sorted(set.intersection(*evaluated) - {0})
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, figsize=(10, 4.2), dpi=110) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        for arm, colour in zip(arms, colours, strict=True):
            runs = result["arms"][arm]["runs"]
            curves = [
                [statistics.fmean(losses.values()) for step, losses in run["curve"] if step in steps] for run in runs
            ]
            points = [spread(list(column)) for column in zip(*curves, strict=True)]
            style = "-" if arm in LISTENING else "--"
            left.plot(steps, [mean for mean, _ in points], style, color=colour, label=arm, linewidth=1.6)
            low, high = ([mean + turn * error for mean, error in points] for turn in (-1, 1))
            left.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        left.set(xlabel="steps", ylabel="held-out loss, mean over skills (nats)")
        left.legend(fontsize=8, frameon=False)
        width = 0.8 / len(arms)
        for number, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
            runs = result["arms"][arm]["runs"]
            every = [[100 * run["accuracy"][name] for run in runs] for name in names] + [[accuracy(r) for r in runs]]
            places = [place + (number - (len(arms) - 1) / 2) * width for place in range(len(every))]
            means, errors = zip(*map(spread, every), strict=True)
            hatch = None if arm in LISTENING else "///"
            right.bar(
                places, means, width * 0.9, yerr=errors, color=colour, hatch=hatch, edgecolor="white", capsize=1.5
            )
        right.axhline(50, color="#555555", linewidth=0.8)
        right.set(ylim=(40, 100), ylabel="accuracy, % (a guess: 50)")
        right.set_xticks(range(len(names) + 1), [*names, "mean"])
        right.grid(axis="x", visible=False)
        seeds = len(result["settings"]["seeds"])
        figure.suptitle(
            f"LEGO, chains of {result['settings']['links']}: {seeds} seeds, bars and bands are standard errors"
        )


def plot_real_text(result: Result, path: Path) -> None:
    """Left the mean held-out loss of every arm, dots are seeds; right what each drew of every source."""
    from pretrain.picture import COLOURS, picture

    names = result["settings"]["sources"]
    arms = sorted(result["arms"], key=lambda arm: -spread([loss(run) for run in result["arms"][arm]["runs"]])[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, figsize=(10, 1.6 + 0.36 * len(arms)), dpi=110) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, arm in enumerate(arms):
            losses = [loss(run) for run in result["arms"][arm]["runs"]]
            mean, error = spread(losses)
            colour = COLOURS[0] if arm in LISTENING else "#777777"
            left.errorbar([mean], [place], xerr=[error], fmt="s", color=colour, capsize=4, markersize=6)
            left.plot(losses, [place + 0.18] * len(losses), ".", color=colour, alpha=0.6, markersize=5)
            begin = 0.0
            for number, name in enumerate(names):
                share = statistics.fmean(run["shares"].get(name, 0.0) for run in result["arms"][arm]["runs"])
                shade = [*COLOURS, "#999999", "#333333"][number % 8]
                right.barh(place, share, 0.7, begin, color=shade, label=name if place == 0 else None)
                begin += share
        left.set_yticks(range(len(arms)), arms)
        left.set(xlabel="held-out loss, mean over sources (nats/token); ■ mean ± s.e., • seeds")
        right.set(xlabel="share of the tokens drawn", xlim=(0, 1))
        right.grid(visible=False)
        figure.legend(
            *right.get_legend_handles_labels(), loc="outside upper center", ncols=8, fontsize=8, frameon=False
        )
