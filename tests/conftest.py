"""Being here puts `tests/` on the import path, so that tests can share `process_group.py` and `small_corpus.py`."""

from small_corpus import corpus, data_config

__all__ = ["corpus", "data_config"]
