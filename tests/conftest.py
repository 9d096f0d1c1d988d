"""Being here puts `tests/` on the import path, so that tests can share `process_group.py` and `small_corpus.py`."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from small_corpus import corpus, data_config

__all__ = ["corpus", "data_config"]

# The same examples every time, so that a run of the tests says something about the code.
# HYPOTHESIS_PROFILE=search draws new ones, to look for what these miss.
# Nothing here is held against a clock: a busy machine must not fail a test.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", patient, derandomize=True)
settings.register_profile("search", patient)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

_cache = tempfile.TemporaryDirectory(prefix="headrace-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name  # no test writes to the user's cache, nor reads what an earlier one left


@pytest.fixture(autouse=True)
def no_process_group_left_open() -> Iterator[None]:
    """A test that fails, or is ended, inside a process group must not take down every later test of its worker."""
    was_open = _in_a_process_group()
    yield
    if not was_open and _in_a_process_group():
        from parallel import process_groups

        process_groups.shutdown()


@pytest.fixture(autouse=True, scope="module")
def nothing_kept_by_cycles() -> Iterator[None]:
    """Models and process groups lie in cycles: of a worker's whole run, some 4 GB and 700 threads, which every fork of
    `run_ranks` then has to copy."""
    yield
    gc.collect()


def _in_a_process_group() -> bool:
    # Not imported here: most tests have no use for torch, which takes seconds to import.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
