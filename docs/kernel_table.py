"""The tables of docs/kernels.md, from benchmarks/results/kernels.json; `generate.py` puts them into the page."""

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
HEAD = (
    "operator", "pass", "dtype", "bytes", "CPU: torch's time / ours", "CPU: of a copy",
    "GPU: target, of a copy", "GPU: measured", "GPU: torch's time / ours", "peers: their time / ours",
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line for each operator, pass and dtype, at the largest shape that was measured. Empty: not measured."""
    measured = {kind: dict(_largest(result[kind])) for kind in ("cpu", "gpu")}
    lines = []
    for key in sorted({*measured["cpu"], *measured["gpu"]}):
        cpu, gpu = (measured[kind].get(key, {}) for kind in ("cpu", "gpu"))
        known = cpu or gpu
        peers = [*_peers(cpu, "CPU"), *_peers(gpu, "GPU")]
        lines.append(
            (
                f"`{key[0]}`",
                key[1],
                key[2],
                f"{known['bytes'] / 1e6:,.1f} MB ({known['shape'].replace(' x ', ' × ')})",
                _number(cpu.get("ratio")),
                _number(cpu.get("of_copy")),
                f"≥ {known['target']:.2f}" if known["target"] else "",
                _number(gpu.get("of_copy")),
                _number(gpu.get("ratio")),
                ", ".join(peers),
            )
        )
    return lines


def facts(result: dict[str, Any]) -> str:
    """What was measured on what, a sentence for each kind of machine."""
    words = []
    for kind, name in (("cpu", "CPU"), ("gpu", "GPU")):
        run = result[kind]
        if run is None:
            words.append(f"{name}: none was at hand, so its cells are empty.")
        else:
            machine = run["machine"]
            words.append(
                f"{name}: `{run['command']}` on {run['date']}, {machine.get('cpu', machine['device'])}, "
                f"torch {machine['torch']}, {machine['load']}. {_slowest(run['results'])}"
            )
    return " ".join(words) + "\n"


def _slowest(results: list[Record]) -> str:
    """The cases in which torch is the faster one."""
    slow = sorted((each for each in results if each["ratio"] < 1), key=lambda each: each["ratio"])
    named = [
        f"{_number(each['ratio'])} for {each['op']}, {each['pass']}, {each['dtype']}, {each['shape']}" for each in slow
    ]
    told = f"torch is the faster one in {len(slow)} of all {len(results)} cases"
    return f"{told}: {'; '.join(named)}.".replace(" x ", " × ") if slow else f"{told}."


def _largest(run: dict[str, Any] | None) -> Iterator[tuple[tuple[str, str, str], Record]]:
    for record in sorted(run["results"] if run else [], key=lambda each: each["bytes"]):
        yield (record["op"], record["pass"], record["dtype"]), record


def _peers(record: Record, device: str) -> Iterator[str]:
    for name, found in (record.get("peers") or {}).items():
        if "ratio" in found:
            yield f"{name} on {device} {found['ratio']:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
