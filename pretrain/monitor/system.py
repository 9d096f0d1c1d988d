"""How a run has been kept going: its starts, its checkpoints, what launchers tried."""

from typing import Any, Final

import orjson

from pretrain.monitor.run_files import read_plain
from pretrain.monitor.run_folder import RunFolder

MOST_BYTES: Final = 4 << 20
"""The end of `attempts.jsonl` that is read."""
MOST_ROWS: Final = 200


def starts_and_checkpoints(run: RunFolder) -> dict[str, Any]:
    """The journal's starts, ways back and checkpoints, and the newest of `launch/attempts.jsonl`."""
    starts, checkpoints = [], []
    for event in run.journal.events:
        if event.kind in ("run_started", "resumed", "rollback", "run_finished", "anomaly"):
            why = str(event.data.get("why") or event.data.get("cause") or "")[:500]
            starts.append({"time": event.time, "step": event.step, "kind": event.kind, "why": why})
        elif event.kind == "checkpoint":
            checkpoints.append({"time": event.time, "step": event.step, "tokens": event.data.get("tokens")})
    there = {entry.name for entry in _entries(run)}
    for row in checkpoints:
        row["there"] = f"step-{row['step']:08d}" in there
    return {"starts": starts[-MOST_ROWS:], "checkpoints": checkpoints[-MOST_ROWS:], "attempts": _attempts(run)}


def _entries(run: RunFolder) -> list[Any]:
    try:
        return list((run.path / "checkpoints").iterdir())
    except OSError:
        return []


def _attempts(run: RunFolder) -> list[dict[str, Any]]:
    try:
        lines = read_plain(run.path / "launch" / "attempts.jsonl", MOST_BYTES, end=True).splitlines()
    except OSError:
        return []
    found = []
    for line in lines[-MOST_ROWS:]:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(record, dict):
            simple = {str(key)[:60]: value for key, value in list(record.items())[:12]}
            found.append({key: str(value)[:200] for key, value in simple.items() if not isinstance(value, dict | list)})
    return found
