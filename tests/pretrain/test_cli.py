"""The command line as a person meets it: what it prints, and the code it leaves with."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
import yaml

from data_scheduler import DataConfig, Scheduler
from data_scheduler.state import Snapshots
from pretrain import train  # imported here once, or every child would spend seconds on it
from pretrain.cli import main

assert train

Headrace = Callable[..., tuple[int, str]]


@pytest.fixture
def headrace(tmp_path: Path) -> Headrace:
    """Runs `headrace ARGUMENTS` in a child; returns (exit code, output)."""

    def call(*arguments: object) -> tuple[int, str]:
        log = tmp_path / "output"
        log.unlink(missing_ok=True)

        def run() -> int:
            sys.argv = ["headrace", *map(str, arguments)]
            try:
                main()
            except SystemExit as end:
                return int(end.code or 0)
            return 0

        return child_process.run(run, log), log.read_text()

    return call


@pytest.fixture
def config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Path:
    raw: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {
            "family": "llama", "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 32,
        },
        "data": data_config(seq_len=16, global_batch_size=4, lanes=4).model_dump(),
        "train": {"steps": 3, "threads": 1},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def one_line(result: tuple[int, str], code: int, *parts: str) -> None:
    got, output = result
    assert got == code, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("headrace: error: ")]
    assert len(lines) == 1, output
    for part in parts:
        assert part in lines[0]


def test_help_lists_every_room(headrace: Headrace) -> None:
    code, output = headrace("--help")
    assert code == 0
    for command in ("train", "data", "tokenizer", "config", "convert", "launch", "doctor", "report"):
        assert command in output


def test_train_replay_trace_ledger(headrace: Headrace, config: Path, tmp_path: Path) -> None:
    assert headrace("train", config)[0] == 0
    run = tmp_path / "run"
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    hashes = {record["step"]: record["batch_sha256"] for record in recorded if "batch_sha256" in record}
    code, output = headrace("data", "replay", run, "--steps", "0:2")
    assert code == 0
    assert {int(line.split()[0]): line.split()[1] for line in output.splitlines()} == hashes
    assert all(len(line.split()) == 2 for line in output.splitlines())  # other programs read these lines
    code, output = headrace("data", "replay", run, "--steps", "0:2", "--sha256")
    assert (code, [line.split() for line in output.splitlines()]) == (0, [[str(n), hashes[n]] for n in range(3)])
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics.replace(hashes[1], "0" * 64))
    one_line(headrace("data", "replay", run, "--steps", "0:2", "--sha256"), 3, "the first is 1")
    (run / "metrics.jsonl").write_text(metrics)
    for ahead in (["replay", run, "--steps", "2:3"], ["trace", run, "--step", 3], ["ledger", run, "--step", 4]):
        code, output = headrace("data", *ahead)
        assert code == 0
        assert "has trained steps 0 to 2; later ones are shown as its plan stands now" in output
    code, output = headrace("data", "trace", run, "--step", 1, "--text")
    assert code == 0
    assert output.count("== slot") >= 4
    code, output = headrace("data", "trace", run, "--step", 1, "--json")
    assert code == 0
    documents = [json.loads(line) for line in output.splitlines()]
    assert {document["slot"] for document in documents} == set(range(4))
    assert all(document["text"].startswith(document["source"]) for document in documents)
    code, output = headrace("data", "ledger", run, "--json")
    assert code == 0
    assert sum(source["tokens"] for source in json.loads(output)["sources"]) == 3 * 4 * 17
    for command in (["ledger"], ["trace", "--step", "0"]):
        code, output = headrace("data", command[0], run, *command[1:])
        assert (code, "note:" in output) == (0, False)


def test_several_processes_are_one_command(headrace: Headrace, config: Path, tmp_path: Path) -> None:
    code, output = headrace("train", config, "--nproc", 2, "train.steps=2")
    assert code == 0, output
    assert "step 2/2" in output
    assert (tmp_path / "run" / "log" / "rank-1.log").exists()


def test_config_show_and_schema(headrace: Headrace, config: Path) -> None:
    code, output = headrace("config", "show", config, "optimizer.lr=1e-3")
    assert code == 0
    assert yaml.safe_load(output)["optimizer"]["lr"] == 0.001
    code, output = headrace("config", "schema")
    assert code == 0
    assert json.loads(output)["title"] == "RunConfig"


def test_bad_input_is_one_line_and_code_2(headrace: Headrace, config: Path, tmp_path: Path) -> None:
    one_line(headrace("train", tmp_path / "none.yaml"), 2, "none.yaml", "not found")
    one_line(headrace("train", config, "train.stpes=1"), 2, "train.stpes", "did you mean 'steps'?")
    one_line(headrace("train", config, "data.sources.a.paths=[/nowhere/x.jsonl]"), 2, "no file at /nowhere/x.jsonl")
    one_line(headrace("train", config, "data.tokenizer=/nowhere"), 2, "/nowhere")
    one_line(headrace("train", config, "parallel.tensor_parallel_size=2"), 2, "tensor_parallel_size")
    one_line(headrace("train", config, "data.global_batch_size=3", "train.micro_batch_size=2"), 2, "micro_batch_size")
    one_line(headrace("data", "replay", tmp_path, "--steps", "0:1"), 2, "journal.jsonl")
    one_line(headrace("data", "replay", tmp_path, "--steps", "zero"), 2, "A:B")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_empty_source_is_one_line(headrace: Headrace, config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    result = headrace("train", config, f"data.sources.a.paths=[{tmp_path / 'empty.jsonl'}]")
    one_line(result, 2, "source 'a'", "empty.jsonl")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ("No such command 'trian'", "(see `headrace --help`)")),
        (["config", "show"], ("Missing argument 'CONFIG'", "(see `headrace config show --help`)")),
        (["train", "x.yaml", "--nprocs", "3"], ("No such option: --nprocs", "`headrace train --help`")),
        (["data", "trace", "runs/x", "--step", "-1"], ("'--step'", "greater than or equal to 0")),
        (["data", "sample", "--out", "FILE"], ("FILE", "Not a directory")),
        (["data", "sample", "--out", "FILE/deeper"], ("FILE/deeper", "Not a directory")),
        (["train", "FILE/x.yaml"], ("FILE/x.yaml", "Not a directory")),
        (["launch", "local", "CONFIG", "--max-failures", "-1"], ("--max-failures",)),
        (["train", "CONFIG", "run.dir=FILE"], ("FILE", "Not a directory")),
    ],
)
def test_wrong_command_lines_are_one_line(
    headrace: Headrace, config: Path, tmp_path: Path, arguments: list[str], parts: tuple[str, ...]
) -> None:
    file = tmp_path / "file"
    file.touch()

    def real(word: str) -> str:
        return word.replace("FILE", str(file)).replace("CONFIG", str(config))

    code, output = headrace(*map(real, arguments))
    assert code == 2
    assert len(output.splitlines()) == 1, output
    one_line((code, output), 2, *(part.replace("FILE", str(file)) for part in parts))


def test_a_bare_group_shows_its_help(headrace: Headrace) -> None:
    code, output = headrace("data")
    assert code == 2
    assert "simulate" in output


@pytest.mark.parametrize("kilobytes", [16, 64])
def test_a_full_disk_is_one_line(headrace: Headrace, config: Path, tmp_path: Path, kilobytes: int) -> None:
    """16 kB fill up with the journal, 64 kB with the checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk to fill needs the right to mount one")
    try:
        one_line(headrace("train", config, f"run.dir={disk}/run"), 2, "No space left on device")
        assert not list(disk.glob("run/checkpoints/step-*[0-9]"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a child may still be leaving


def test_rejects_are_written_once(headrace: Headrace, config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps({"text": f"text {n} " * 30}) + "\n" for n in range(40)) + "{oops\n")
    arguments = ["train", config, f"data.sources.a.paths=[{bad}]", "data.sources.a.weight=100"]
    assert headrace(*arguments, "train.steps=100")[0] == 0
    assert headrace(*arguments, "train.steps=120")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert len(lines) == 1
    assert lines[0]["source"] == "a"
    assert lines[0]["file"] == str(bad)
    assert "not valid JSON" in lines[0]["reason"]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert kinds.count("reject") == 1


def test_looking_back_needs_no_torch(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    """The data commands start quickly because nothing heavy is imported."""
    scheduler = Scheduler(data_config(), run_dir=tmp_path)
    next(scheduler)
    Snapshots(tmp_path).save(scheduler.state_dict())
    code = (
        "import sys; from pretrain.cli import main; sys.argv = ['headrace', 'data', 'ledger', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
