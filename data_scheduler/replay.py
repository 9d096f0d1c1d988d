"""Looking back at a run: which documents a past step held, and its hash again from the raw files.

Nothing is recorded per document during training. The journal fixes the order, so a past step is made again: from the
nearest kept state (one per checkpoint) on, by the same code that made it the first time.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from data_scheduler.batch import ORDINAL_BITS, Batch
from data_scheduler.config import DataConfig
from data_scheduler.encoder import Encoder
from data_scheduler.formats.records import Document, MarkedText, Versions
from data_scheduler.identity import source_configs
from data_scheduler.journal import Journal
from data_scheduler.lane import LaneStream, Position
from data_scheduler.left_out import Part, place_of
from data_scheduler.order import Int64
from data_scheduler.packers import PACKERS
from data_scheduler.packing import Carry
from data_scheduler.plan import Plan
from data_scheduler.scheduler import Scheduler
from data_scheduler.source import SourceReader
from data_scheduler.state import Snapshots
from headrace.errors import ConfigError


class TracedDocument(NamedTuple):
    """A stretch of a document in a batch."""

    slot: int
    source: str
    file: str
    record: int
    """Number of the record in the file, counted from 0; in the byte range `within` where there is one."""
    within: tuple[int, int] | None
    """Byte range of the file's text (decompressed) the record is counted in; None: the whole file."""
    token_start: int
    token_stop: int
    """The document's tokens [token_start, token_stop) are in the batch; the last may be the end-of-document token."""
    text: str
    """The document as it is in the file; of several templates under the first."""
    given: str | None = None
    """What the batch holds of it, decoded, where the source has transforms: they make another text in each epoch."""


def open_run(run_dir: str | Path) -> Scheduler:
    """A scheduler that replays the run in `run_dir`. Raises ConfigError when there is no journal there."""
    path = Path(run_dir) / "journal.jsonl"
    if not path.exists():
        raise ConfigError(f"{run_dir}: no journal.jsonl there; give a run folder")
    journal = Journal(path, writable=False)
    if not journal.events:
        raise ConfigError(f"{path}: the journal is empty; the run never began")
    data = journal.events[0].data["data"] | {"prefetch": 0, "policy": {}}
    config = DataConfig.model_validate(data | {"sources": source_configs(journal)})
    return Scheduler(config, run_dir=run_dir, journal=journal, replaying=True)


def replay(run_dir: str | Path, first: int, last: int) -> Iterator[Batch]:
    """The global batches of steps first … last, both included, made again."""
    if not 0 <= first <= last:
        raise ConfigError(f"steps {first}:{last}: give A:B with 0 <= A <= B")
    scheduler = open_run(run_dir)
    state = Snapshots(run_dir).nearest(first)
    if state is not None:
        scheduler.load_state_dict(state)
    for batch in scheduler:
        if batch.step >= first:
            yield batch
        if batch.step >= last:
            return


def recorded_hashes(run_dir: str | Path) -> dict[int, str]:
    """step → the hash that training recorded in `metrics.jsonl`; of a step trained twice the last one."""
    path = Path(run_dir) / "metrics.jsonl"
    found: dict[int, str] = {}
    if path.exists():
        with open(path, "rb") as lines:
            for line in lines:
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError:
                    continue  # a line that a kill has torn
                if isinstance(record, dict) and "batch_sha256" in record:
                    found[int(record["step"])] = str(record["batch_sha256"])
    return found


def trace(run_dir: str | Path, step: int, slot: int | None = None) -> list[TracedDocument]:
    """Every stretch of a document in a step's global batch, or in one slot of it."""
    batch = next(iter(replay(run_dir, step, step)))
    if slot is not None and not 0 <= slot < len(batch.slots):
        raise ConfigError(f"slot {slot}: step {step} has slots 0 to {len(batch.slots) - 1}")
    scheduler = open_run(run_dir)
    scheduler.see_files_of(step)
    readers = scheduler.readers
    rows = range(len(batch.slots)) if slot is None else [slot]
    return [document for row in rows for document in _trace_row(batch, row, readers)]


def _text(document: Document | None, encoder: Encoder) -> str:
    if isinstance(document, MarkedText | Versions):
        return document.text
    return document if isinstance(document, str) else "" if document is None else encoder.decode(document)


def _trace_row(batch: Batch, row: int, readers: list[SourceReader]) -> Iterator[TracedDocument]:
    reader = readers[int(batch.source_ids[row])]
    edges = [*batch.starts[row].tolist(), batch.tokens.shape[1]]
    for number, document in enumerate(batch.segment_ids[row].tolist()):
        chunk, place = document >> ORDINAL_BITS, document & ((1 << ORDINAL_BITS) - 1)
        unit = reader.chunks[chunk].unit
        begin = int(batch.offsets[row][number])
        length = edges[number + 1] - edges[number]
        records, _ = reader.records(chunk)
        text = _text(records.documents[place], reader.encoder)
        record, within = reader.record_number(chunk, records, place)
        given = None
        if reader.transforms is not None:
            given = reader.encoder.decode(batch.tokens[row, edges[number] : edges[number + 1]].tolist())
        yield TracedDocument(
            int(batch.slots[row]), reader.config.name, unit.path, record, within, begin, begin + length, text, given
        )


class LedgerRow(NamedTuple):
    """What one source has given to a run."""

    source: str
    sequences: int
    tokens: int
    share_asked: float
    """Mean journaled share over the tokens of the run."""
    share_realised: float
    epochs: float
    """Mean over lanes of the epochs completed; the current one counts by chunks."""
    documents_seen: list[int]
    """documents_seen[n]: documents of which some token was given in exactly n epochs."""


def ledger(run_dir: str | Path, step: int | None = None) -> tuple[int, list[LedgerRow]]:
    """(step, one row per source), exact after `step` steps; by default at the newest kept state."""
    kept = Snapshots(run_dir).steps()
    at = step if step is not None else (kept[-1] if kept else 0)
    scheduler = _at_step(run_dir, at)
    passed = _passed_over(run_dir, scheduler, at)
    state = scheduler.state_dict()
    asked = _asked(scheduler.plan, scheduler.names, at)
    given = np.asarray(state["given"]).sum(axis=0)
    total = max(1, int(given[:, 1].sum()))
    rows = []
    for number, reader in enumerate(scheduler.readers):
        places = [scheduler.place(lane, number) for lane in range(scheduler.config.lanes)]
        sequences, tokens = given[number].tolist()
        rows.append(
            LedgerRow(
                reader.config.name,
                sequences,
                tokens,
                asked[number],
                tokens / total,
                _epochs(reader, [position for position, _ in places]),
                _documents_seen(
                    reader,
                    places,
                    scheduler.config.packing,
                    _joined(run_dir, scheduler, number, at),
                    passed.get(reader.config.name, []),
                ),
            )
        )
    return at, rows


def epochs_done(run_dir: str | Path, step: int) -> dict[str, float]:
    """source → epochs after `step` steps, the mean over its lanes; as `ledger` says, without reading any document when
    the state of that step is kept."""
    scheduler = _at_step(run_dir, step)
    lanes = range(scheduler.config.lanes)
    return {
        reader.config.name: _epochs(reader, [scheduler.place(lane, number)[0] for lane in lanes])
        for number, reader in enumerate(scheduler.readers)
    }


def _at_step(run_dir: str | Path, step: int) -> Scheduler:
    """A replaying scheduler that has given `step` steps."""
    scheduler = open_run(run_dir)
    state = Snapshots(run_dir).nearest(step)
    if state is not None:
        scheduler.load_state_dict(state)
    while scheduler.state_dict()["step"] < step:
        next(scheduler)
    scheduler.see_files_of(step)
    return scheduler


class _PassedOver(NamedTuple):
    """Where lanes stood when a part of their source was put under quarantine, and where when it was let in again."""

    part: Part
    begin: list[tuple[Position, Carry]]
    end: list[tuple[Position, Carry]] | None
    """None: it is still out."""


def _passed_over(run_dir: str | Path, scheduler: Scheduler, step: int) -> dict[str, list[_PassedOver]]:
    """What lanes have passed over in each source, by `step`."""
    packing = PACKERS[scheduler.config.packing]

    @cache
    def places(at: int, source: int) -> list[tuple[Position, Carry]]:
        then = _at_step(run_dir, at)
        reader, lanes = then.readers[source], range(then.config.lanes)
        opened = [
            packing(LaneStream(reader, lane, place), carry)
            for lane in lanes
            for place, carry in [then.place(lane, source)]
        ]
        return [(packer.reached, Carry()) for packer in opened]

    found: dict[str, list[_PassedOver]] = {}
    for number, name in enumerate(scheduler.names):
        steps = [0, 0, *(growth.step for growth in scheduler.plan.grown.get(name, []))]
        for out in scheduler.plan.left_out(name):
            if steps[out.first] < step:
                end = None if out.stop is None or steps[out.stop] >= step else places(steps[out.stop], number)
                found.setdefault(name, []).append(_PassedOver(out.part, places(steps[out.first], number), end))
    return found


def _joined(run_dir: str | Path, scheduler: Scheduler, source: int, step: int) -> list[list[int]]:
    """Per joining of new files before `step`, the epoch that each lane's stream was in: new chunks are in that one and
    those after it."""
    name, packing = scheduler.names[source], PACKERS[scheduler.config.packing]
    joined: list[list[int]] = []
    for growth in scheduler.plan.grown.get(name, []):
        if not growth.manifest["folders"]:
            joined.append([])  # nothing joined: a part was put under quarantine, or let in again
        elif growth.step < step:
            then = _at_step(run_dir, growth.step)
            reader = then.readers[source]
            places = [then.place(lane, source) for lane in range(then.config.lanes)]
            streams = [(LaneStream(reader, lane, position), carry) for lane, (position, carry) in enumerate(places)]
            joined.append(
                [
                    packing(*opened).reached.epoch if opened[1].bins > 0 else opened[0].position.epoch
                    for opened in streams
                ]
            )
    return joined


def _asked(plan: Plan, names: list[str], steps: int) -> list[float]:
    """Mean share asked for over the run's tokens."""
    asked, tokens = dict.fromkeys(names, 0.0), 0
    for begin, end in itertools.pairwise(sorted({0, steps, *plan.turns(steps)})):
        shape = plan.shape.at(begin)
        count = (end - begin) * shape["global_batch_size"] * (shape["seq_len"] + 1)
        tokens += count
        weights = plan.asked(begin) or {}
        for name, weight in weights.items():
            asked[name] += weight / sum(weights.values()) * count
    return [asked[name] / max(1, tokens) for name in names]


def _epochs(reader: SourceReader, positions: list[Position]) -> float:
    done = 0.0
    for lane, position in enumerate(positions):
        hand = reader.hand(position.epoch, lane, position.generations, reader.generations)
        done += position.epoch + position.cursor / max(1, len(hand))
    return done / len(positions)


def _documents_seen(
    reader: SourceReader,
    places: list[tuple[Position, Carry]],
    packing: str,
    joined: list[list[int]],
    passed_over: list[_PassedOver],
) -> list[int]:
    """How many documents were seen 0, 1, 2, … times. Reads every chunk once."""
    documents = [reader.records(chunk)[1] for chunk in range(len(reader.chunks))]
    seen = _passes(reader, documents, places, packing, joined)
    counted: dict[int, list[Int64]] = {}
    for part, begin, end in passed_over:
        end = places if end is None else end
        for stand in (begin, end):
            if id(stand) not in counted:  # many records are taken out at once
                counted[id(stand)] = _passes(reader, documents, stand, packing, joined)
        before, after = counted[id(begin)], counted[id(end)]
        for chunk in reader.chunks_of(part.file):
            own = np.ones(len(documents[chunk]), np.bool_)
            if part.record is not None:
                own = documents[chunk] == place_of(reader, chunk, part)
            seen[chunk] -= np.where(own, np.maximum(0, after[chunk] - before[chunk]), 0)
    counts = np.bincount(np.concatenate(seen)) if documents else np.zeros(1, dtype=np.int64)
    return [int(count) for count in counts]


def _passes(
    reader: SourceReader,
    documents: list[Int64],
    places: list[tuple[Position, Carry]],
    packing: str,
    joined: list[list[int]],
) -> list[Int64]:
    """How often each document was passed on the way to `places`: int64[documents] for every chunk."""
    seen = [np.zeros(len(ordinals), dtype=np.int64) for ordinals in documents]
    for lane, (position, carry) in enumerate(places):
        for past in range(position.epoch):
            for chunk in reader.hand(past, lane, 1, reader.generations).tolist():
                generation = reader.generation_of(chunk)
                seen[chunk] += generation == 0 or past >= joined[generation - 1][lane]
        hand = reader.hand(position.epoch, lane, position.generations, reader.generations).tolist()
        for chunk in hand[: position.cursor]:
            seen[chunk] += 1
        if position.cursor < len(hand):
            chunk = hand[position.cursor]
            order = reader.order(chunk, len(documents[chunk]), position.epoch)
            seen[chunk][order[: position.document + (1 if position.token else 0)]] += 1
        if carry.bins > 0:  # what was given of the packer's open window comes on top
            for document in PACKERS[packing](LaneStream(reader, lane, position), carry).begun().tolist():
                chunk, ordinal = document >> ORDINAL_BITS, document & ((1 << ORDINAL_BITS) - 1)
                seen[chunk][documents[chunk].searchsorted(ordinal)] += 1
    return seen
