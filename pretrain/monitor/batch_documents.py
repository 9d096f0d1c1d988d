"""What was in a past batch: `headrace data trace` for the page, one question at a time.

The step is made again from the raw files, which takes as long as making the steps from the nearest kept data state on.
"""

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from data_scheduler.replay import trace
from pretrain.monitor.run_files import check_data_of

MOST_TEXT: Final = 4000
"""Characters of a document that go to the page."""
_one_at_a_time = threading.Lock()


def documents(run_dir: Path, step: int, version: str) -> list[dict[str, Any]]:
    """Every stretch of a document in a step's global batch. `version`: the journal's, on which the answer depends.
    Raises HeadraceError, OSError when the data cannot be read any more, or is not to be: another user's run."""
    check_data_of(run_dir)
    with _one_at_a_time:
        return _documents(run_dir, step, version)


@lru_cache(maxsize=8)
def _documents(run_dir: Path, step: int, version: str) -> list[dict[str, Any]]:
    return [
        {
            "slot": found.slot,
            "source": found.source,
            "file": found.file,
            "record": found.record,
            "within": found.within,
            "token_start": found.token_start,
            "token_stop": found.token_stop,
            "text": found.text[:MOST_TEXT],
            "characters": len(found.text),
            "given": None if found.given is None else found.given[:MOST_TEXT],
        }
        for found in trace(run_dir, step)
    ]
