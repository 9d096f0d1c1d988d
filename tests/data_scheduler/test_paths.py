"""Formats and compressions by name."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler.paths import COMPRESSIONS, FORMATS, UNCOMPRESSED, file_kind
from headrace.errors import ConfigError

parts = st.sampled_from([".", "/", "?", "a", "part-0", *FORMATS, *COMPRESSIONS, ".zstd", ".JSONL", "gz"])


@given(st.lists(parts, max_size=6).map("".join), st.sampled_from(["auto", "jsonl", "parquet", "datatrove:warc"]))
def test_a_files_kind_is_that_of_its_last_suffixes(path: str, wanted: str) -> None:
    stem, suffix = os.path.splitext(path.split("?", 1)[0])
    compression = suffix if suffix in COMPRESSIONS else None
    kind = FORMATS.get(os.path.splitext(stem)[1] if compression else suffix) if wanted == "auto" else wanted
    if kind is None or (compression and kind in UNCOMPRESSED):
        with pytest.raises(ConfigError, match=r"read in place|cannot tell the format"):
            file_kind(path, wanted)
    else:
        assert file_kind(path, wanted) == (kind, compression)
