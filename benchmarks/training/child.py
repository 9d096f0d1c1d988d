"""One arm: `python -m benchmarks.training.child ARM SETTINGS WEIGHTS`, orders on stdin, answers on stdout.

ARM is `ours`, `plain`, `hf` or `hf_whole_rows`; WEIGHTS a file that `ours` writes its starting weights to and the
others read.
"""

import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.training.gate import Gate
from benchmarks.training.settings import Settings


def main() -> None:
    arm, settings, weights = sys.argv[1], Settings(**json.loads(sys.argv[2])), Path(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    torch.set_num_threads(1)
    gate = Gate(sys.stdin, answers)
    if arm == "ours":
        from benchmarks.training.ours import run
    elif arm == "plain":
        from benchmarks.training.plain import run
    else:
        from benchmarks.training.hf import run_rows, run_whole_rows

        run = run_whole_rows if arm == "hf_whole_rows" else run_rows
    if arm != "ours":
        sys.stdin.readline()  # imports are done side by side; the weights are there from here on
    run(settings, weights, gate)


if __name__ == "__main__":
    main()
