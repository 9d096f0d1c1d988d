"""Every rejected record stands in `rejects.jsonl` once, also over restarts."""

import json
from pathlib import Path

from data_scheduler.batch import RejectedRecord
from pretrain.rejects import Rejects


def test_a_record_is_written_and_counted_once(tmp_path: Path) -> None:
    one, two, other = (RejectedRecord(s, f"{s}.jsonl", str(n), "torn") for s, n in (("a", 1), ("a", 2), ("b", 1)))
    rejects = Rejects(tmp_path)
    assert rejects.add([one, one, other]) == {"a": 1, "b": 1}
    assert rejects.add([one]) == {}
    resumed = Rejects(tmp_path)
    with open(tmp_path / "rejects.jsonl", "ab") as file:
        file.write(b'{"source": "cut sh')  # by a kill
    assert resumed.add([two, other]) == {"a": 1}
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines[:2]] == ["1", "1"]
    assert sum('"record":"2"' in line for line in lines) == 1
