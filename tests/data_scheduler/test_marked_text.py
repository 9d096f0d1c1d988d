"""Loss weights and masked stretches: from a record's fields to the batch, and through to what training minimises."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scheduler import DataConfig, Scheduler
from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import MarkedText
from data_scheduler.reading import UnitReader, whole_file

Make = Callable[..., DataConfig]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, **fields: Any) -> Any:
    reader = UnitReader(SourceConfig.model_validate({"name": "s", "paths": [path], **fields}))
    return reader.read(whole_file(path)[0])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prompts_and_spans_become_pieces(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"q": "two and two?", "text": "four, of course", "quiet": [[4, 6], [9, 15]], "w": 0.5},
        {"q": "why", "text": "because", "quiet": [], "w": None},
    ]
    path = write(tmp_path / f"x{suffix}", rows)
    records = read(path, prompt="Q: {q}\nA: ", masked_key="quiet", loss_weight_key="w")
    assert records.documents == [
        MarkedText(
            (("Q: two and two?\nA: ", False), ("four", True), (", ", False), ("of ", True), ("course", False)), 0.5
        ),
        MarkedText((("Q: why\nA: ", False), ("because", True)), 1.0),
    ]
    assert not records.rejects


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "abc", "q": "x", "quiet": [[0, 9]]}, "within the text"),
        ({"text": "abc", "q": "x", "quiet": [[2, 1]]}, "ascending"),
        ({"text": "abc", "q": "x", "quiet": [[0, 2], [1, 3]]}, "ascending"),
        ({"text": "abc", "q": "x", "quiet": [[0, 1, 2]]}, "pairs"),
        ({"text": "abc", "q": "x", "quiet": "all"}, "pairs"),
        ({"text": "abc", "q": "x", "quiet": [[True, 2]]}, "pairs"),
        ({"text": "abc", "q": "x", "w": -1}, "not a weight"),
        ({"text": "abc", "q": "x", "w": "heavy"}, "not a weight"),
        ({"text": "abc"}, "field 'q' is missing"),
    ],
)
def test_marks_that_make_no_sense_are_rejects(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    records = read(write(tmp_path / "x.jsonl", [row]), prompt="{q} ", masked_key="quiet", loss_weight_key="w")
    assert [reject.record for reject in records.rejects] == [0]
    assert reason in records.rejects[0].reason


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_batch_knows_which_tokens_carry_loss(data_config: Make, tmp_path: Path, packing: str) -> None:
    """Prompts are written in capitals and answers in small letters, so a token's text says what its weight must be."""
    rows = [
        {"q": "ASK" * (1 + n % 7), "text": f"say{n}" * (1 + n % 5), "w": [0.5, 1.0, 2.0][n % 3]} for n in range(300)
    ]
    source = {
        "name": "s", "paths": [write(tmp_path / "x.jsonl", rows)], "prompt": "{q}", "loss_weight_key": "w",
        "loss_weight": 0.5,
    }  # fmt: skip
    plain = {"name": "p", "paths": [write(tmp_path / "y.jsonl", [{"text": "plain " * 9}] * 300)]}
    scheduler = Scheduler(data_config(sources=[source, plain], lanes=2, global_batch_size=2, packing=packing))
    seen: set[float] = set()
    for _ in range(20):
        batch = next(scheduler)
        for row in range(2):
            if batch.source_ids[row] == 1:
                assert batch.weights[row] is None
                assert (batch.loss_weights[row] == batch.loss_mask[row]).all()
                continue
            starts = [*batch.starts[row].tolist(), batch.tokens.shape[1]]
            for begin, end in itertools.pairwise(starts):
                for place in range(max(begin, 1), end):
                    text = scheduler.encoder.decode([int(batch.tokens[row, place])])
                    weight = float(batch.loss_weights[row, place - 1])
                    if place == begin or text.strip().isupper():
                        assert weight == 0.0
                        assert not batch.loss_mask[row, place - 1]
                    else:
                        assert weight in (0.25, 0.5, 1.0)
                        assert batch.loss_mask[row, place - 1]
                        seen.add(weight)
    assert seen == {0.25, 0.5, 1.0}


def test_weights_are_part_of_the_hash(data_config: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "some words here"}] * 50)
    digests = [
        next(Scheduler(data_config(sources=[{"name": "s", "paths": [path], "loss_weight": weight}]))).digests
        for weight in (1.0, 0.5, 0.25)
    ]
    assert len({tuple(digest) for digest in digests}) == 3
    assert np.all([len(digest) == 24 for digest in digests])
