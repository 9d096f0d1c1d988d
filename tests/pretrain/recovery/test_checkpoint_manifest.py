"""A checkpoint that is not what was written is not used."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.recovery.manifest import NAME, DamagedCheckpoint, set_aside, verify, write_manifest


def checkpoint(folder: Path) -> Path:
    (folder / "rng").mkdir(parents=True)
    for name, content in (("__0_0.distcp", os.urandom(5000)), ("meta.json", b"{}"), ("rng/rank-00000.pt", b"x" * 99)):
        (folder / name).write_bytes(content)
    write_manifest(folder, {})
    return folder


def test_what_was_written_passes_however_many_ranks_look(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    for parts in (1, 2, 7):
        for part in range(parts):
            verify(folder, part, parts)


@given(file=st.sampled_from(["__0_0.distcp", "meta.json", "rng/rank-00000.pt"]), bit=st.integers(0, 10**6))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, file: str, bit: int) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("c") / "c")
    content = bytearray((folder / file).read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    (folder / file).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="SHA-256 differs"):
        verify(folder)


def test_torn_and_missing_files_are_found_by_some_rank(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    with open(folder / "__0_0.distcp", "r+b") as file:
        file.truncate(4096)
    with pytest.raises(DamagedCheckpoint, match="has 4096 bytes, 5000 were written"):
        for part in range(2):
            verify(folder, part, 2)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="No such file"):
        verify(folder)


def test_a_damaged_or_hostile_manifest_is_damage(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    for text in ("", "[]", '{"files": {"a": {}}}', '{"files": {"../x": {"size": 1, "sha256": "0"}}}'):
        (folder / NAME).write_text(text)
        with pytest.raises(DamagedCheckpoint, match="manifest"):
            verify(folder)


def test_a_checkpoint_set_aside_keeps_its_files_and_its_name_is_free(tmp_path: Path) -> None:
    first = set_aside(checkpoint(tmp_path / "step-00000004"))
    second = set_aside(checkpoint(tmp_path / "step-00000004"))
    assert {first.name, second.name} == {"step-00000004.damaged", "step-00000004.damaged-2"}
    verify(first)
