"""Calls a launcher of an emulated kernel under AddressSanitizer: `asan_call.py LIBRARY FUNCTION ARGUMENTS`.

ARGUMENTS is a JSON list of int64s and [n]s, which stand for n bytes of zeros of their own. Run it by `command`. It
loads neither torch nor numpy, which are slow to start under AddressSanitizer.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def command(library: Path, function: str, arguments: list[Any]) -> subprocess.CompletedProcess[str]:
    """Runs it; the answer's stderr has AddressSanitizer's words, and its returncode is not 0 if it had some."""
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = {
        **os.environ,
        "LD_PRELOAD": asan.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # Python's own would put small arrays side by side
    }
    words = [sys.executable, "-S", __file__, str(library), function, json.dumps(arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    values = [
        ctypes.create_string_buffer(a[0]) if isinstance(a, list) else ctypes.c_int64(a) for a in json.loads(sys.argv[3])
    ]
    sys.exit(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(*values))
