"""Columns of long `metrics.jsonl` files, kept in the user's cache folder, so that they are parsed once and not at every
start.

A kept file is used only when the bytes before its reading place are those in `metrics.jsonl` still; anything odd about
it means that it is not used, never an error.
"""

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from pretrain.monitor.metrics_index import KINDS, Column, MetricsIndex, Table

WORTH_KEEPING: Final = 16 << 20
"""Bytes of `metrics.jsonl`; less is parsed in half a second."""
_FORMAT: Final = 1


def cache_folder() -> Path:
    """Where they are: `$XDG_CACHE_HOME/headrace/dashboard`, or under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace" / "dashboard"


def keep(index: MetricsIndex) -> None:
    """Write the index's columns, when they are worth it. A disk that is full or read-only changes nothing."""
    if index.offset < WORTH_KEEPING:
        return
    with index.lock:
        arrays: dict[str, Any] = {
            "head": np.array([_FORMAT, index.offset, int.from_bytes(index.mark(), "big")], np.int64)
        }
        for kind, table in index.tables.items():
            arrays |= {f"{kind}.step": table.step.view(), f"{kind}.tokens": table.tokens.view()}
            arrays[f"{kind}.names"] = np.array(list(table.values), dtype=np.str_)
            for number, name in enumerate(table.values):
                arrays[f"{kind}.{number}.rows"] = table.rows[name].view()
                arrays[f"{kind}.{number}.values"] = table.values[name].view()
    path = _path(index.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, new = tempfile.mkstemp(dir=path.parent, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
    except OSError:
        return


def restore(index: MetricsIndex) -> bool:
    """Give a new index the columns that were kept of its file; whether there were some. `update` then finds out whether
    the file is still the same."""
    try:
        with np.load(_path(index.path), allow_pickle=False) as kept:
            form, offset, mark = kept["head"].tolist()
            if form != _FORMAT:
                return False
            tables = {}
            for kind in KINDS:
                table = tables[kind] = Table()
                series = {
                    str(name): (
                        Column(np.uint32, kept[f"{kind}.{number}.rows"]),
                        Column(np.float32, kept[f"{kind}.{number}.values"]),
                    )
                    for number, name in enumerate(kept[f"{kind}.names"].tolist())
                }
                table.restore(Column(np.int64, kept[f"{kind}.step"]), Column(np.int64, kept[f"{kind}.tokens"]), series)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
    index.restore(offset, mark.to_bytes(4, "big"), tables)
    return True


def _path(metrics: Path) -> Path:
    return cache_folder() / (hashlib.sha256(os.fsencode(metrics.resolve())).hexdigest()[:32] + ".npz")
