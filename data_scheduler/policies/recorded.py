"""Files that policies read when a run begins: another run's metrics, a skills graph. All come from outside, so every
value is checked, and what is wrong is said in one line."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError


def metrics_file(path: str, where: str) -> Path:
    """The metrics.jsonl that a run folder, or the path itself, is. Raises ConfigError."""
    file = Path(path).expanduser()
    file = file / "metrics.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(f"{where}: {path}: no metrics.jsonl there; give a run folder or such a file")
    return file


def records(path: str, where: str) -> Iterator[dict[str, Any]]:
    """The records of a run's metrics.jsonl; a torn line is passed over. Raises ConfigError when there is no file."""
    with open(metrics_file(path, where), "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line that a kill has torn
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield record


def source_numbers(record: dict[str, Any], key: str) -> dict[str, float]:
    """The finite numbers by source under a key of a record; metrics.jsonl writes NaN as a string."""
    values = record.get(key)
    if not isinstance(values, dict):
        return {}
    return {
        name: float(value) for name, value in values.items() if type(value) in (int, float) and math.isfinite(value)
    }


def final_losses(path: str, names: Sequence[str], last: int, where: str) -> dict[str, float]:
    """Mean training loss of each source over its last `last` reports, by tokens. Raises ConfigError if it has none."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for record in records(path, where):
        tokens = source_numbers(record, "source_tokens")
        for name, loss in source_numbers(record, "source_loss").items():
            if name in seen and tokens.get(name, 0) > 0:
                seen[name] = [*seen[name][1 - last :], (loss, tokens[name])] if last > 1 else [(loss, tokens[name])]
    missing = [name for name in names if not seen[name]]
    if missing:
        raise ConfigError(f"{where}: {path} has no loss of {', '.join(missing)}; give a run with the same sources")
    return {
        name: sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
        for name, pairs in seen.items()
    }


def graph_of(path: str, where: str) -> dict[str, Any]:
    """A skills graph as `headrace mix estimate-graph` writes it: {"sources": [...], "graph": [[...]]}."""
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        found = {"sources": content["sources"], "graph": content["graph"]}
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{where}: {path}: not a graph of `headrace mix estimate-graph`") from None
    return found
