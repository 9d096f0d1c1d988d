"""The compiled inner loops (`csrc/loader/sequences.c`), where they are there; HEADRACE_NATIVE=0 leaves them aside.

Each has its definition in numpy beside the place where it is called. The loops are called 10,000 times a second on
arrays so small that numpy's calls are all of the cost.
"""

import os
from importlib import import_module
from typing import Any


def _compiled() -> Any:
    if os.environ.get("HEADRACE_NATIVE", "1") == "0":
        return None
    try:
        return import_module("data_scheduler._sequences")
    except ImportError:
        return None


LOOPS = _compiled()
"""The module, or None."""
