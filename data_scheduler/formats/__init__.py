"""File formats: each file here turns one kind of file into records.

| file | reads |
|---|---|
| `compression.py` | .gz .zst .bz2 .xz around any whole-file format |
| `lines.py` | .jsonl .ndjson |
| `columns.py` | .parquet .arrow .feather .csv |
| `plain.py` | .txt: a file is a document |
| `tokens.py` | .npy and Megatron .bin/.idx: documents that are token ids already |

`reading.UnitReader` is the door. A format is a function from a `Unit` and an `Extractor` to `Records`.
"""
