"""The compiled inner loops (`csrc/loader/sequences.c`), where they are there; HEADRACE_NATIVE=0 leaves them aside.

Each has its definition in numpy beside the place where it is called. The loops are called 10,000 times a second on
arrays so small that numpy's calls are all of the cost.
"""

import os
from importlib import import_module
from typing import Any

VERSION = 2
"""Of the functions' arguments and results, as in the C source."""


def _compiled() -> Any:
    if os.environ.get("HEADRACE_NATIVE", "1") == "0":
        return None
    try:
        loops = import_module("data_scheduler._sequences")
    except ImportError:
        return None
    # One that was compiled from other sources, before an update say, is left aside like one that is missing.
    return loops if getattr(loops, "VERSION", 1) == VERSION else None


LOOPS = _compiled()
"""The module, or None."""
