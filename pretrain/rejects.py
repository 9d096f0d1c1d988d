"""`rejects.jsonl` of a run: every record that was left out, once."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import orjson

from data_scheduler.batch import RejectedRecord


class Rejects:
    """The file, and what stands in it; the first rank's."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "rejects.jsonl"
        self._seen: set[tuple[str, str, str]] = set()

    def add(self, rejects: Iterable[RejectedRecord]) -> dict[str, int]:
        """Write those that are not there yet; how many they are, by source."""
        if not self._seen and self._path.exists():
            lines = [orjson.loads(line) for line in self._path.read_bytes().splitlines() if line.endswith(b"}")]
            self._seen = {(line["source"], line["file"], line["record"]) for line in lines}
        new = [reject for reject in dict.fromkeys(rejects) if tuple(reject[:3]) not in self._seen]
        self._seen |= {(reject.source, reject.file, reject.record) for reject in new}
        if new:
            with open(self._path, "ab") as file:
                file.write(b"".join(orjson.dumps(reject._asdict()) + b"\n" for reject in new))
        return dict(Counter(reject.source for reject in new))
