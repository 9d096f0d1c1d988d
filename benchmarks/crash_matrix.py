"""The crash matrix of `docs/recovery.md`, made of its tests: every failure that has a name, and what happened.

    python benchmarks/crash_matrix.py                 each case once, as in CI
    python benchmarks/crash_matrix.py --kills 200     and so many kills at random points of a step or a save

Runs `tests/pretrain/recovery/test_crash_matrix.py` and keeps what its tests record. A test that fails leaves no result.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from loading.result import circumstances, result_options, versions, write_result

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "crash_matrix.json"
TESTS = "tests/pretrain/recovery/test_crash_matrix.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_options(parser, RESULT)
    parser.add_argument("--kills", type=int, default=0, help="random kills (default: as many as in CI)")
    words = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if words.kills:
        environment["HEADRACE_RANDOM_KILLS"] = str(words.kills)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", TESTS, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        cases = ElementTree.parse(report).iter("testcase")  # written by the line above
        found = [{each.attrib["name"]: each.attrib["value"] for each in case.iter("property")} for case in cases]
    result = {**circumstances("crash_matrix.py"), "versions": versions(["torch", "megatron-core"]), "cases": found}
    write_result(words.out, result)


if __name__ == "__main__":
    main()
