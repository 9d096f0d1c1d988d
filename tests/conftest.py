"""Being here puts `tests/` on the import path, so that tests can share `process_group.py` and `small_corpus.py`."""

import os
import tempfile

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
