"""Copies of checkpoints in a second place are whole or not there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ConfigError
from pretrain.recovery.manifest import DamagedCheckpoint, verify, write_manifest
from pretrain.recovery.second_place import JOURNAL, SecondPlace

FILES = ("__0_0.distcp", "__1_0.distcp", "meta.json", "rng/rank-00000.pt")


class Cut(Exception):
    """The process that copied has ended here."""


def run_folder(root: Path, *steps: int, start: str = "first") -> Path:
    """A run folder with whole checkpoints."""
    for step in steps:
        folder = root / "checkpoints" / f"step-{step:08d}"
        (folder / "rng").mkdir(parents=True)
        for name in FILES:
            (folder / name).write_bytes(os.urandom(3000))
        write_manifest(folder, {})
    (root / JOURNAL).write_text(json.dumps({"start": start}) + "\n" + '{"torn')
    return root


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(params=["a folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SecondPlace]:
    yield SecondPlace(str(tmp_path / "second") if request.param == "a folder" else "memory://second/cod")
    fsspec.filesystem("memory").store.clear()


def test_what_was_put_comes_back_bit_for_bit(place: SecondPlace, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 4, 8)
    assert place.steps() == []
    for step in (4, 8):
        assert place.put(folder_of(run, step), run / JOURNAL)
        assert not place.put(folder_of(run, step), run / JOURNAL)  # it is there
    assert place.steps() == [4, 8]
    sums = place.sums(8)
    assert set(sums) == {*FILES, JOURNAL}
    for name, wanted in sums.items():
        place.fetch(8, name, wanted, tmp_path / "back" / name)
    write_manifest(tmp_path / "back", sums)
    verify(tmp_path / "back")
    assert all((tmp_path / "back" / name).read_bytes() == (folder_of(run, 8) / name).read_bytes() for name in FILES)
    assert (tmp_path / "back" / JOURNAL).read_text() == '{"start": "first"}\n'  # without the torn line


@given(st.integers(0, 5))
def test_a_copy_that_is_cut_short_is_not_there(tmp_path_factory: pytest.TempPathFactory, files: int) -> None:
    """Whichever file is the last to be written."""
    root = tmp_path_factory.mktemp("cut")
    run, place = run_folder(root / "run", 4), SecondPlace(str(root / "second"))
    original, written = place._system.open, []

    def cut(path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb":
            written.append(path)
            if len(written) > files:
                raise Cut
        return original(path, mode, **more)

    place._system.open = cut
    try:
        with pytest.raises(Cut):
            place.put(folder_of(run, 4), run / JOURNAL)
    finally:
        place._system.open = original
    assert place.steps() == []
    assert place.put(folder_of(run, 4), run / JOURNAL)
    assert place.steps() == [4]


def test_what_changed_on_either_side_is_noticed(tmp_path: Path) -> None:
    run, place = run_folder(tmp_path / "run", 4, 8), SecondPlace(str(tmp_path / "second"))
    place.put(folder_of(run, 4), run / JOURNAL)
    for path in (tmp_path / "second" / "step-00000004" / FILES[1], folder_of(run, 8) / FILES[1]):
        content = bytearray(path.read_bytes())
        content[1000] ^= 4
        path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"__1_0.distcp is not what was written"):
        place.fetch(4, FILES[1], place.sums(4)[FILES[1]], tmp_path / "x")
    with pytest.raises(DamagedCheckpoint, match=r"__1_0.distcp is not what was written"):
        place.put(folder_of(run, 8), run / JOURNAL)
    assert place.steps() == [4]


def test_what_reads_back_as_something_else_gets_no_manifest(tmp_path: Path) -> None:
    run, place = run_folder(tmp_path / "run", 4), SecondPlace(str(tmp_path / "second"))
    original = place._system.open

    def losing(path: str, mode: str = "rb", **more: Any) -> Any:
        opened = original(path, mode, **more)
        if mode == "wb":
            write = opened.write
            opened.write = lambda piece: write(piece[:-1])
        return opened

    place._system.open = losing
    try:
        with pytest.raises(OSError, match="reads back as something else"):
            place.put(folder_of(run, 4), run / JOURNAL)
    finally:
        place._system.open = original
    assert place.steps() == []


def test_another_runs_place_is_left_alone(place: SecondPlace, tmp_path: Path) -> None:
    run, other = run_folder(tmp_path / "run", 4), run_folder(tmp_path / "other", 6, start="second")
    place.put(folder_of(run, 4), run / JOURNAL)
    with pytest.raises(ConfigError, match="another run"):
        place.put(folder_of(other, 6), other / JOURNAL)
    assert place.steps() == [4]


def test_old_copies_go_and_those_cut_short_too(place: SecondPlace, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 2, 4, 6, 8, 10)
    for step in (2, 4, 6, 8, 10):
        place.put(folder_of(run, step), run / JOURNAL)
    place._system.rm_file(place._path(6, "manifest.json"))
    place.retire(10, keep_last=1, keep_every=4)
    assert place._folders() == {4: True, 8: True, 10: True}
