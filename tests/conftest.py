"""Being here puts `tests/` on the import path, so that tests can share `process_group.py` and `small_corpus.py`."""

import os
import tempfile

import hypothesis
from small_corpus import corpus, data_config

__all__ = ["corpus", "data_config"]

_cache = tempfile.TemporaryDirectory(prefix="headrace-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name  # no test writes to the user's cache, nor reads what an earlier one left

# A busy machine must not fail a test: hypothesis' own deadline is 200 ms an example.
hypothesis.settings.register_profile("no clock", deadline=None)
hypothesis.settings.load_profile("no clock")
