"""Where a run stands in its data: a few integers per (lane, source), whatever was consumed.

Ten int32 say where a lane stands in a source, two int64 what it gave and one int32 how often it was asked: 60 bytes a
pair; a run of 240 lanes and 50 sources has 720 KB.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_scheduler.lane import Position
from data_scheduler.mixture import tally
from data_scheduler.order import Int64
from data_scheduler.packing import Carry
from data_scheduler.policies import Feedback
from data_scheduler.sequences import Int32, count
from headrace.errors import CheckpointError, ConfigError

VERSION = 2
EXHAUSTED = -1
"""In the place of `Carry.bins`: the lane is through with the source; `Carry.width` is the `max_epochs` it reached."""


PLACE = len(Position._fields) + len(Carry._fields)


def _beginnings(lanes: int, sources: int) -> Int32:
    """int32[lanes, sources, PLACE]: every lane at the beginning of every source."""
    beginnings = np.empty((lanes, sources, PLACE), dtype=np.int32)
    beginnings[:] = Position() + Carry()
    return beginnings


class Touched(NamedTuple):
    """A lane's new position in a source."""

    lane: int
    source: int
    position: Position
    carry: Carry


@dataclass
class State:
    """The consumer's position: everything before it was delivered, nothing after it."""

    names: list[str]
    step: int
    """Next step."""
    sequences: int
    """Sequences delivered, over all ranks."""
    positions: Int32
    """int32[lanes, sources, 10]: a `Position`, then a `Carry`; rows of other ranks' lanes are not kept up to date."""
    given: Int64
    """int64[lanes, sources, 2]: sequences and tokens delivered; rows of other ranks' lanes likewise."""
    owed: Int64
    """int64[sources]: the mixer's state."""
    asked: Int32
    """int32[lanes, sources]: how often each lane was asked for a sequence of each source; the same on every rank."""
    policy: dict[str, Any] = field(default_factory=dict)
    """The policy's own state."""
    wanted: dict[str, float] = field(default_factory=dict)
    """The weights the policy asked for last; while it repeats itself, what a person set stays."""
    feedback: list[Feedback] = field(default_factory=list)
    """Reports the policy has not been given yet."""

    @staticmethod
    def fresh(lanes: int, names: list[str]) -> "State":
        """The state of a run that has not begun."""
        positions = _beginnings(lanes, len(names))
        given = np.zeros((lanes, len(names), 2), dtype=np.int64)
        return State(
            names, 0, 0, positions, given, np.zeros(len(names), dtype=np.int64), np.zeros((lanes, len(names)), np.int32)
        )

    def consume(self, touched: list[Touched], owed: Int64, asked: tuple[Int64, Int32], width: int) -> None:
        """Count one step as delivered: the sequences `asked` of (lanes, sources), of `width` tokens each."""
        sources = len(self.names)
        places = [
            lane * sources + source if carry.bins != EXHAUSTED else ~(lane * sources + source)
            for lane, source, _, carry in touched
        ]
        numbers = chain.from_iterable(position + carry for _, _, position, carry in touched)
        rows = np.fromiter(numbers, np.int32, PLACE * len(touched)).reshape(-1, PLACE)
        count(
            np.array(places, np.int64),
            rows,
            self.positions.reshape(-1, PLACE),
            self.given.reshape(-1, 2),
            width,
        )
        self.owed = owed
        tally(self.asked, *asked)
        self.step += 1
        self.sequences += len(asked[0])

    def copy(self) -> "State":
        """A state whose positions can be read while this one moves on."""
        return replace(self, positions=self.positions.copy())

    def place(self, lane: int, source: int) -> tuple[Position, Carry]:
        """Where a lane stands in a source."""
        row = self.positions[lane, source].tolist()
        return Position(*row[:5]), Carry(*row[5:])

    def keep_feedback_from(self, step: int) -> None:
        """Forget reports before `step`; the policy has them in its own state."""
        self.feedback = [report for report in self.feedback if report.step >= step]

    def to_dict(self, dp_rank: int, dp_size: int) -> dict[str, Any]:
        """The state as plain numbers and arrays, with the lanes it is valid for."""
        return {
            "version": VERSION,
            "sources": list(self.names),
            "step": self.step,
            "sequences": self.sequences,
            "positions": self.positions.copy(),
            "given": self.given.copy(),
            "owed": self.owed.copy(),
            "asked": self.asked.copy(),
            "policy": dict(self.policy),
            "wanted": dict(self.wanted),
            "feedback": [
                [f.step, dict(f.source_loss), dict(f.source_tokens), dict(f.validation_loss), dict(f.shares)]
                for f in self.feedback
            ],
            "lanes_mod": [dp_rank, dp_size],
        }

    @staticmethod
    def from_dict(state: Mapping[str, Any], lanes: int, names: list[str], dp_rank: int, dp_size: int) -> "State":
        """Take up a saved state; sources added since start at their beginning. Raises ConfigError."""
        if state.get("version") != VERSION:
            raise ConfigError(f"data state of version {state.get('version')!r}; this Headrace reads {VERSION}")
        saved = list(state["sources"])
        positions = np.asarray(state["positions"], dtype=np.int32)
        given = np.asarray(state["given"], dtype=np.int64)
        if positions.shape[0] != lanes:
            raise ConfigError(f"data state of {positions.shape[0]} lanes; data.lanes is {lanes}")
        if names[: len(saved)] != saved:
            raise ConfigError(f"data state of the sources {', '.join(saved)}; the run has {', '.join(names)}")
        rank, size = state["lanes_mod"]
        if size != 1 and (dp_size % size or dp_rank % size != rank):
            raise ConfigError(
                f"data state of rank {rank} of {size} does not hold the lanes of rank {dp_rank} of {dp_size}; "
                "merge the states of all ranks first (data_scheduler.merge_states)"
            )
        new = len(names) - len(saved)
        pad = np.zeros(new, dtype=np.int64)
        return State(
            names,
            int(state["step"]),
            int(state["sequences"]),
            np.concatenate([positions, _beginnings(lanes, new)], axis=1),
            np.concatenate([given, np.zeros((lanes, new, 2), dtype=np.int64)], axis=1),
            np.concatenate([np.asarray(state["owed"], dtype=np.int64), pad]),
            np.pad(np.asarray(state["asked"], dtype=np.int32), ((0, 0), (0, new))),
            dict(state["policy"]),
            dict(state["wanted"]),
            [Feedback(*report) for report in state["feedback"]],
        )


def merge_states(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One state with all lanes from the states of all ranks at the same step. Raises ConfigError."""
    first = states[0]
    size = first["lanes_mod"][1]
    if sorted(state["lanes_mod"][0] for state in states) != list(range(size)):
        raise ConfigError(f"merging data states needs one of each of the {size} ranks, got {len(states)}")
    if any(state["step"] != first["step"] for state in states):
        raise ConfigError("merging data states needs states of the same step")
    merged = {key: np.array(first[key]) for key in LANE_ARRAYS}
    for state in states:
        rank = state["lanes_mod"][0]
        for key, array in merged.items():
            array[rank::size] = np.asarray(state[key])[rank::size]
    return {**first, **merged, "lanes_mod": [0, 1]}


LANE_ARRAYS = ("positions", "given")
"""What each rank knows of its own lanes only; the first axis counts lanes."""
ARRAYS = (*LANE_ARRAYS, "owed", "asked")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state as `.npz` without pickle, atomically: the file is whole or not there."""
    rest = json.dumps({key: value for key, value in state.items() if key not in ARRAYS}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        arrays = {key: np.asarray(state[key]) for key in ARRAYS}
        np.savez(file, allow_pickle=False, rest=np.frombuffer(rest, dtype=np.uint8), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises CheckpointError when the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            state: dict[str, Any] = json.loads(file["rest"].tobytes())
            return state | {key: file[key] for key in ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a readable data state: {error}") from None


class Snapshots:
    """The states kept in `<run>/data_state/`, one per checkpoint, so that any past step can be replayed quickly."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._folder = Path(run_dir) / "data_state"

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state holding all lanes."""
        save_state(self._folder / f"step-{state['step']:08d}.npz", state)

    def steps(self) -> list[int]:
        """Steps with a state, ascending."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self._folder.glob("step-*.npz"))

    def nearest(self, step: int) -> dict[str, Any] | None:
        """The newest state at or before `step`, None when a replay must begin at step 0."""
        before = [kept for kept in self.steps() if kept <= step]
        return load_state(self._folder / f"step-{before[-1]:08d}.npz") if before else None

    def drop_after(self, step: int) -> None:
        """Remove states past `step`: the run was resumed there and may have gone another way since."""
        for kept in self.steps():
            if kept > step:
                (self._folder / f"step-{kept:08d}.npz").unlink()
