"""What nodes say of themselves, and which of them are used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import node_check
from launch.nodes import choose_nodes, read_checks

LIMITS = {"max_clock_skew_s": 5.0, "min_allreduce_gb_per_s": 10.0}
HEALTHY = "0, NVIDIA H200, 0, No, No, Not Active\n1, NVIDIA H200, 0, No, No, Not Active\n"


def check(folder: Path, **changes: object) -> list[str]:
    """The problems a real process finds on this machine."""
    checks = {"gpus": 0, "read": [], "write": [str(folder)], "min_free_gb": 0, "commands": [], **changes}
    asked = folder.with_name("checks.json")
    asked.write_text(json.dumps(checks))
    command = [sys.executable, "-IS", node_check.__file__, str(asked), str(folder)]
    subprocess.run(command, env={**os.environ, "SLURMD_NODENAME": "mill"}, check=True, stdout=subprocess.DEVNULL)
    found = read_checks(folder)
    assert found is not None
    return found["mill"]["problems"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_a_good_node_has_no_problems(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a-0.jsonl").write_text("{}")
    read = [str(tmp_path / "a-*"), str(tmp_path), str(tmp_path / "a-0.jsonl")]
    assert check(folder, read=read, commands=["true"]) == []
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_what_is_wrong_is_named(folder: Path) -> None:
    found = check(
        folder,
        read=["/no/such/data-*"],
        write=["/no/such/run", str(folder)],
        min_free_gb=1e9,
        commands=["echo the fan has stopped; false", "exit 3"],
    )
    assert found[:2] == ["/no/such/data-*: no such file here", "/no/such/run: No such file or directory"]
    assert "GB free (at least 1e+09)" in found[2]
    assert found[3].endswith(": the fan has stopped")
    assert found[4] == "exit 3: exit code 3"


@pytest.mark.parametrize(
    ("answer", "code", "problem"),
    [
        (HEALTHY, 0, None),
        (HEALTHY.replace("0, No, No", "[N/A], [N/A], [N/A]"), 0, None),
        (HEALTHY.splitlines()[0], 0, "1 GPUs visible, 2 wanted"),
        (HEALTHY.replace("H200, 0", "H200, 3", 1), 0, "GPU 0 (NVIDIA H200): 3 uncorrected ECC errors"),
        (HEALTHY.replace("No, No", "Yes, No", 1), 0, "memory rows to be remapped"),
        (HEALTHY.replace("Not Active", "Active", 1), 0, "clocks held down"),
        ("Unable to determine the device handle for GPU0000", 15, "nvidia-smi: Unable to determine"),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, answer: str, code: int, problem: str | None) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = list(node_check.broken_gpus(2, lambda words: subprocess.CompletedProcess(words, code, answer)))
    assert (not found) if problem is None else problem in found[0]


def test_gpus_that_slurm_did_not_give_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = list(node_check.broken_gpus(2, lambda words: subprocess.CompletedProcess(words, 0, HEALTHY)))
    assert found == ["1 GPUs visible, 2 wanted"]


def test_xids_of_the_hardware() -> None:
    log = "NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus\nNVRM: Xid (PCI:0000:1b:00): 13, a program's\n"
    assert list(node_check.recent_xids(lambda words: subprocess.CompletedProcess(words, 0, log))) == [
        "XID 79 in the kernel's log"
    ]
    assert list(node_check.recent_xids(lambda words: subprocess.CompletedProcess(words, 1, log))) == []


def good(node: str, **changes: object) -> dict:
    return {"node": node, "time": 1000.0, "problems": [], **changes}


def test_the_first_good_nodes_are_used_in_order() -> None:
    states = dict.fromkeys("dcba", "allocated")
    checks = {node: good(node) for node in "abcd"}
    assert choose_nodes(states, checks, [2], LIMITS).use == ["d", "c"]
    assert choose_nodes(states, checks, [1, 3], LIMITS).use == ["d", "c", "b"]
    assert choose_nodes(states, None, [5], LIMITS).use == []


@pytest.mark.parametrize("state", ["down", "down*", "drained", "draining", "mixed*", "FAIL"])
def test_nodes_that_slurm_thinks_ill_of(state: str) -> None:
    choice = choose_nodes({"a": "mixed", "b": state}, {"a": good("a")}, [1], LIMITS)
    assert (choice.use, choice.bad) == (["a"], {"b": f"SLURM says {state}"})


def test_what_only_the_others_show() -> None:
    states = dict.fromkeys("abcde", "mixed")
    checks = {
        "a": good("a", allreduce_gb_per_s=[40.0, 2.0]),  # slow with one neighbour: the neighbour's fault
        "b": good("b", allreduce_gb_per_s=[2.0, 1.5]),
        "c": good("c", time=1010.0),
        "d": good("d", problems=["no GPU"]),
    }
    choice = choose_nodes(states, checks, [1], LIMITS)
    assert choice.use == ["a"]
    assert choice.bad == {
        "b": "all-reduce at 2 GB/s (at least 10)",
        "c": "its clock is +10.0 s off the other nodes' (at most 5)",
        "d": "no GPU",
        "e": "its check gave no answer",
    }


def test_an_answer_that_was_cut_short_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"node": "a", "ti')
    (tmp_path / "b.json").write_text(json.dumps(good("b")))
    (tmp_path / "b.bandwidth.json").write_text(json.dumps({"node": "b", "allreduce_gb_per_s": [3.0]}))
    assert read_checks(tmp_path) == {"b": good("b", allreduce_gb_per_s=[3.0])}
    assert read_checks(tmp_path / "none") is None
