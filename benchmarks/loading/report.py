"""Tables and the picture of a throughput result; they say nothing that is not in the file."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
TITLES = {
    "text": "From text",
    "tokens": "From text tokenized before",
    "variant": "Headrace from .jsonl.zst, otherwise set",
    "floor": "What the parts cost alone (.jsonl.zst, one source after the other)",
}
Rows = list[list[str]]


def tables(result: Result) -> list[tuple[str, list[str], Rows]]:
    """(title, head, rows) of every table: speeds by group, then the phases."""
    found = []
    for group, title in TITLES.items():
        arms = [arm for arm in result["arms"] if arm["group"] == group]
        names = list(dict.fromkeys(arm["name"] for arm in arms))
        counts = sorted({arm["sources"] for arm in arms if arm["sources"]})
        if not names:
            continue
        compared = group in ("text", "tokens")
        head = ["", *([f"{n} sources" for n in counts] or ["Mtok/CPU-s"])]
        head += ["Headrace from .jsonl.zst is … times as fast"] if compared else []
        rows = []
        for name in names:
            own = {arm["sources"]: arm for arm in arms if arm["name"] == name}
            row = [next(iter(own.values()))["label"], *(_speed(own.get(n)) for n in counts or [None])]
            if compared:
                row.append(" / ".join(_ratio(own[n]) for n in counts if n in own))
            rows.append(row)
        found.append((title, head, rows))
    profiles = [arm for arm in result["arms"] if arm["group"] == "profile" and "phases_cpu_s" in arm]
    if profiles:
        found.append(_phases(profiles))
    return found


def _speed(arm: Result | None) -> str:
    if arm is None:
        return ""
    if "not_run" in arm:
        return "not run"
    spread = arm["mtok_per_cpu_s"]
    return f"{_number(spread['median'])} ({_number(spread['min'])} to {_number(spread['max'])})"


def _ratio(arm: Result) -> str:
    ratio = arm.get("ratio", {}).get("ours_text")
    return f"{_number(ratio['median'])}" if ratio else "–"


def _number(value: float) -> str:
    """Three digits that count, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _phases(profiles: list[Result]) -> tuple[str, list[str], Rows]:
    head = ["CPU seconds per 10 M tokens", *(f"{arm['sources']} sources" for arm in profiles)]
    names = list(dict.fromkeys(phase for arm in profiles for phase in arm["phases_cpu_s"]))
    rows = []
    for name in names:
        shares = []
        for arm in profiles:
            total, part = sum(arm["phases_cpu_s"].values()), arm["phases_cpu_s"].get(name, 0.0)
            shares.append(f"{part / arm['tokens'] * 1e7:.3f} ({part / total:.0%})")
        rows.append([name, *shares])
    return "Where our CPU time goes (.jsonl.zst, without the loader thread)", head, rows


def show(result: Result, console: Console) -> None:
    """Print the tables."""
    for title, head, rows in tables(result):
        table = Table(title=title, title_justify="left")
        for column, name in enumerate(head):
            table.add_column(name, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for arm in result["arms"]:
        if "not_run" in arm:
            console.print(f"not run: {arm['label']}: {arm['not_run']}", markup=False)


def markdown(result: Result) -> str:
    """The tables for a page."""
    parts = []
    for title, head, rows in tables(result):
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        parts.append(f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    missing = [f"- Not run: {arm['label']}: {arm['not_run']}" for arm in result["arms"] if "not_run" in arm]
    return "\n".join(parts + (["\n".join(dict.fromkeys(missing)) + "\n"] if missing else []))


def plot(result: Result, picture: Path) -> None:
    """Bars of both compared groups: median, whiskers from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in ("text", "tokens") if any(_drawn(result, group).values())]
    sizes = [len(_drawn(result, group)) for group in groups]
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(8.6, 1.2 + 0.42 * sum(sizes)), height_ratios=sizes, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    shades = {True: {2: "#7fb3d5", 8: "#1f618d"}, False: {2: "#d5d8dc", 8: "#808b96"}}
    for axis, group in zip(axes[:, 0], groups, strict=True):
        drawn = _drawn(result, group)
        order = sorted(drawn, key=lambda name: max(arm["mtok_per_cpu_s"]["median"] for arm in drawn[name]))
        for place, name in enumerate(order):
            arms = sorted(drawn[name], key=lambda arm: -arm["sources"])
            height = 0.8 / len(arms)
            for turn, arm in enumerate(arms):
                spread, at = arm["mtok_per_cpu_s"], place + (turn - (len(arms) - 1) / 2) * height
                whiskers = [[spread["median"] - spread["min"]], [spread["max"] - spread["median"]]]
                colour = shades[not arm["peer"]][arm["sources"]]
                axis.barh(at, spread["median"], height * 0.92, color=colour, xerr=whiskers, ecolor="#17202a", capsize=2)
                axis.text(spread["max"] * 1.06, at, _number(spread["median"]), va="center", fontsize=7.5)
        axis.set_yticks(range(len(order)), [drawn[name][0]["label"] for name in order], fontsize=9)
        axis.set_title(TITLES[group], loc="left", fontsize=10.5, fontweight="bold")
        axis.set_xscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", which="major", color="#e5e8e8")
        axis.set_axisbelow(True)
    low = min(
        arm["mtok_per_cpu_s"]["min"] for group in groups for arms in _drawn(result, group).values() for arm in arms
    )
    high = max(
        arm["mtok_per_cpu_s"]["max"] for group in groups for arms in _drawn(result, group).values() for arm in arms
    )
    axes[-1, 0].set_xlim(low / 1.6, high * 1.8)
    axes[-1, 0].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    settings = result["settings"]
    axes[-1, 0].set_xlabel(
        f"million tokens per CPU-second, log scale; median of {settings['repeats']}, whiskers: least to most\n"
        f"batches of {settings['batch']} × {settings['seq_len']:,} tokens, one core ({result['machine']['cpu']}); "
        "pale: 2 sources, dark: 8; blue: Headrace",
        fontsize=8.5,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def _drawn(result: Result, group: str) -> dict[str, list[Result]]:
    """Name → its arms that ran, of one group."""
    found: dict[str, list[Result]] = {}
    for arm in result["arms"]:
        if arm["group"] == group and "mtok_per_cpu_s" in arm:
            found.setdefault(arm["name"], []).append(arm)
    return found
