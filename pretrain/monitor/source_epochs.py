"""How often each source has been gone through, at the newest kept data state.

Opening a run's sources can take seconds, so the answer is kept until there is a newer state.
"""

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_scheduler.replay import epochs_done
from data_scheduler.state import Snapshots
from headrace.errors import HeadraceError
from pretrain.monitor.run_files import check_data_of
from pretrain.monitor.run_folder import RunFolder

_one_at_a_time = threading.Lock()


def epochs(run: RunFolder) -> dict[str, Any]:
    """{"step", "sources": {name: epochs}}, or {"error"} when the data cannot be looked at from here."""
    try:
        check_data_of(run.path)
        kept = Snapshots(run.path).steps()
        if not kept:
            return {"error": "known from the first checkpoint on"}
        with _one_at_a_time:
            return {"step": kept[-1], "sources": _epochs(run.path, kept[-1], run.journal.generation)}
    except HeadraceError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.filename or 'data'}: {error.strerror}"}
    except (ValueError, KeyError, TypeError) as error:  # a journal by another hand
        return {"error": f"the run's data cannot be opened ({type(error).__name__})"}


@lru_cache(maxsize=32)
def _epochs(run_dir: Path, step: int, generation: int) -> dict[str, float]:
    return epochs_done(run_dir, step)
