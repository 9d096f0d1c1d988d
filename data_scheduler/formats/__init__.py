"""File formats: each file here turns one kind of file into records.

| file | reads |
|---|---|
| `compression.py` | .gz .zst .bz2 .xz around any whole-file format |
| `lines.py` | .jsonl .ndjson |
| `columns.py` | .parquet .arrow .feather |
| `csv.py` | .csv |
| `plain.py` | .txt: a file is a document |
| `tokens.py`, `token_index.py` | .npy, Megatron .bin/.idx, datatrove .ds: documents that are token ids already |
| `datatrove_files.py` | .warc, and what else datatrove's readers read |

`reading.UnitReader` is the door. A format is a function from an open file, a `Unit` and an `Extractor` to `Records`.
"""
