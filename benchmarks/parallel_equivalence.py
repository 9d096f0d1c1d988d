"""The tables of `docs/parallel.md`: how far every layout's training is from one process's, as the tests measured it.

    python benchmarks/parallel_equivalence.py            every model under every layout, every checkpoint into every one
    python benchmarks/parallel_equivalence.py --part     what CI tries: half of the models, each layout from a few

Runs `tests/pretrain/test_equivalence.py` and `tests/pretrain/test_reshard.py` and keeps the figures that the tests
record. A test that fails leaves no result.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from loading.result import circumstances, result_options, versions, write_result

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "parallel_equivalence.json"
Properties = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_options(parser, RESULT)
    parser.add_argument("-k", dest="only", default="", help="only layouts whose name has these words, as pytest's -k")
    parser.add_argument("--part", action="store_true", help="what CI tries (an eighth of the time)")
    words = parser.parse_args()
    equivalence = recorded("tests/pretrain/test_equivalence.py", "every_layout", words.only, words.part)
    reshard = recorded("tests/pretrain/test_reshard.py", "any_layout", words.only, words.part)
    result = {
        **circumstances("parallel_equivalence.py"),
        "versions": versions(["torch", "megatron-core"]),
        "equivalence": {row.pop("layout"): {name: numbers(text) for name, text in row.items()} for row in equivalence},
        "reshard": {row.pop("layout"): {name: float(text) for name, text in row.items()} for row in reshard},
    }
    write_result(words.out, result)


def recorded(tests: str, function: str, only: str, part: bool) -> Properties:
    """The properties that each test of a file recorded."""
    chosen = f"{function} and ({only})" if only else function
    environment = {**os.environ, "HEADRACE_WHOLE_MATRIX": "" if part else "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", tests, "-k", chosen, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        cases = ElementTree.parse(report).iter("testcase")  # written by the line above
        return [{each.attrib["name"]: each.attrib["value"] for each in case.iter("property")} for case in cases]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


# -- tables ------------------------------------------------------------------------------------------------------------


def equivalence_table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row for each layout: the largest relative difference over all models and steps, and where it was."""
    rows = []
    for layout, models in result["equivalence"].items():
        loss, norm = (max(models.items(), key=lambda item: item[1][at]) for at in (0, 1))
        rows.append((f"`{layout}`", f"{len(models)}", f"{loss[1][0]:.0e}", f"{norm[1][1]:.0e}", norm[0]))
    return ("layout", "models", "loss", "gradient norm", "where the gradient norm differs most"), rows


def option_table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row for each model: the largest relative difference over all layouts."""
    found: dict[str, list[list[float]]] = {}
    for models in result["equivalence"].values():
        for model, pair in models.items():
            found.setdefault(model, []).append(pair)
    rows = [(model, *(f"{max(pair[at] for pair in pairs):.0e}" for at in (0, 1))) for model, pairs in found.items()]
    return ("model", "loss", "gradient norm"), rows


def reshard_table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Rows: the layout that loads; columns: the one that saved; the largest relative difference of the next losses."""
    names = list(result["reshard"])
    head = ("loaded under ↓ saved under →", *(str(number) for number in range(1, len(names) + 1)))
    rows = [
        (f"{number} `{name}`", *(cell(result["reshard"][name].get(other)) for other in names))
        for number, name in enumerate(names, 1)
    ]
    return head, rows


def cell(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0.0 else f"{value:.0e}"


if __name__ == "__main__":
    main()
