"""The result file of a benchmark: the command, the machine and the versions it ran with, then what it measured."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any


def result_options(parser: argparse.ArgumentParser, result: Path, picture: Path | None = None) -> None:
    """`--out`, and where there is a picture `--plot` and `--picture`."""
    parser.add_argument("--out", type=Path, default=result, help="JSON file to write (default: the one in results/)")
    if picture is not None:
        parser.add_argument(
            "--plot", type=Path, metavar="RESULT", help="draw the picture of a result file, measure nothing"
        )
        parser.add_argument("--picture", type=Path, default=picture, help="where --plot writes")


def circumstances(script: str) -> dict[str, Any]:
    """How a result came about: `command`, `date`, `machine`. `script`: a file of benchmarks/, or a module's name."""
    return {"command": command(script), "date": str(date.today()), "machine": machine()}


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write the JSON file, and the folder it is in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, Python, load."""
    models = re.findall(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory.group(1)) / 1e6) if memory else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": f"{os.getloadavg()[0]:.1f} processes on {os.cpu_count()} cores in the last minute",
    }


def command(script: str) -> str:
    """The command that is running, without the options that name folders of this machine."""
    words, skip = [], False
    for word in sys.argv[1:]:
        named = word.split("=")[0] in ("--work", "--out", "--picture")
        if not named and not skip:
            words.append(word)
        skip = named and "=" not in word
    return " ".join(["python", f"benchmarks/{script}" if script.endswith(".py") else f"-m {script}", *words])


def versions(names: list[str], python: Path | None = None) -> dict[str, str]:
    """Package → version, of this environment or of another interpreter's."""
    if python is None:
        return {name: _version(name) for name in names}
    code = "import json, importlib.metadata as m; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    found = json.loads(subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    known = {name.lower().replace("_", "-"): version for name, version in found}
    return {name: known.get(name.lower().replace("_", "-"), "not installed") for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
