"""What `benchmarks/data_throughput.py` and `data_soak.py` are made of; all benchmarks share `result.py`.

| file | has |
|---|---|
| `corpus.py` | the text both sides read, found on the machine, in every format |
| `child.py` | one measured process: pinned to a core, warmed up, CPU seconds of N tokens |
| `ours.py` | Headrace's arms: from text, from tokens, from its cache; where its time goes |
| `floors.py` | what part of the work costs alone: decompress, parse, encode |
| `peers.py` | the other loaders, each set up as its documentation says; runs in an environment of its own |
| `prepare.py` | the corpus converted to each peer's own format, in that environment |
| `result.py` | a result file: command, machine, versions |
| `report.py` | tables and the picture, from the result file alone |
"""
