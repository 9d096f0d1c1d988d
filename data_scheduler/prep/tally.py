"""Counting: how many documents and characters reached each step, and the report made of it."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from headrace.errors import DataError

REPORT = "prep_report.json"
REJECTS = "rejects.jsonl"


class Tally(PipelineStep):
    """Counts what passes by, under a label."""

    type = "tally"

    def __init__(self, label: str) -> None:
        self.name = label
        super().__init__()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            self.stat_update("documents")
            self.stat_update("chars", value=len(document.text))
            yield document


class WriteReport(PipelineStep):
    """Adds up the tallies of all tasks of all passes, writes the report and removes what passes left for each other."""

    type = "report"
    name = "report"

    def __init__(self, out: str, labels: list[str], logs: list[str]) -> None:
        """`labels` of the tallies in order, the last one the output's; `logs` the passes' logging folders."""
        super().__init__()
        self.out, self.labels, self.logs = Path(out), labels, [Path(log) for log in logs]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        counts, reasons = self._counts()
        steps = []
        for label, following in zip(self.labels[:-1], self.labels[1:], strict=True):
            before, after = counts[label], counts[following]
            step = {
                "step": label,
                "documents_in": before["documents"],
                "documents_removed": before["documents"] - after["documents"],
                "chars_in": before["chars"],
                "chars_removed": before["chars"] - after["chars"],
            }
            steps.append(step | {"reasons": dict(sorted(reasons[label].items()))})
        read, left = counts["read"], counts[self.labels[-1]]
        report = {
            "records": read["records"],
            "rejected": read["rejected"],
            "steps": steps,
            "documents": left["documents"],
            "chars": left["chars"],
            "files": {str(path.relative_to(self.out)): path.stat().st_size for path in self._files()},
        }
        self._write_rejects()
        # Tallies of a step's two sides come from different blocks; both must tell the same story.
        if read["records"] != read["rejected"] + counts[self.labels[0]]["documents"]:
            raise DataError(f"{self.out}: the tasks' counts do not add up; was a file changed while it was read?")
        temporary = self.out / (REPORT + ".part")
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.out / REPORT)
        for folder in (self.out / "work").glob("*/"):
            for leftover in ("documents", "signatures", "duplicates", "buckets", "clusters", "counts", "rejects"):
                shutil.rmtree(folder / leftover, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in (self.out / "data").glob("*") if path.is_file())

    def _counts(self) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
        """(counts by label and `read`, reasons for removal by label), over all tasks."""
        counts: dict[str, Counter[str]] = {label: Counter() for label in ["read", *self.labels]}
        reasons: dict[str, Counter[str]] = {label: Counter() for label in self.labels}
        for path in (path for log in self.logs for path in sorted((log / "stats").glob("*.json"))):
            label = None
            for block in json.loads(path.read_text()):
                kind, _, name = block["name"].partition(": ")
                numbers = {key: _total(value) for key, value in block["stats"].items()}
                if kind == "read":
                    counts["read"].update({key: numbers.get(key, 0) for key in ("records", "rejected")})
                elif label is not None:  # the block after a step's tally is the step
                    dropped = {key.removeprefix("dropped_"): n for key, n in numbers.items() if "dropped_" in key}
                    reasons[label].update(dropped)
                label = name if kind == Tally.type else None
                if label is not None:
                    counts[label].update(numbers)
        return counts, reasons

    def _write_rejects(self) -> None:
        with open(self.out / REJECTS, "wb") as whole:
            for path in sorted((self.out / "work").glob("*/rejects/*.jsonl")):
                whole.write(path.read_bytes())


def _total(value: Any) -> int:
    """datatrove writes a metric as its total or as an object that has it."""
    return int(value["total"] if isinstance(value, dict) else value)
