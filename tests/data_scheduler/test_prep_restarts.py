"""A preparation killed, started twice, spread over SLURM jobs: always the same bytes, or one line."""

import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("datatrove")

from planted import contents, make_settings, page, run, small

from data_scheduler.prep.config import LocalExecutor, PrepConfig
from data_scheduler.prep.local import run_passes
from data_scheduler.prep.plan import Pass
from data_scheduler.prep.run import prepare
from headrace.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def headrace(config: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", "data", "prep", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_killed_and_resumed_with_more_workers_gives_the_same_bytes(
    settings: dict[str, Any], prepared: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "prep.yaml", Path(settings["out"])
    path.write_text(yaml.safe_dump(settings))
    process = headrace(path, PYTHONHASHSEED="1")
    while not (out / "work" / "00-read" / "completions" / "00000").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "prep_report.json").exists()
    path.write_text(yaml.safe_dump(settings | {"executor": {"kind": "local", "workers": 3}}))
    process = headrace(path, PYTHONHASHSEED="2")
    printed, notes = process.communicate()
    assert process.returncode == 0, notes
    assert re.search(r"^pass 1/9 read: 3 tasks, \d done before$", notes, re.MULTILINE)
    assert "Traceback" not in notes
    assert re.search(r"2-exact_dedup +│ 31 +│ 4", printed)
    assert contents(out) == contents(prepared)


def test_a_finished_preparation_is_not_done_again(prepared: Path, raw: Path, corpus: Path) -> None:
    before = contents(prepared)
    config = PrepConfig.model_validate(make_settings(raw, corpus, prepared))
    assert prepare(config).was_done
    assert contents(prepared) == before


def test_another_configuration_or_input_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": page(0)}) + "\n")
    settings = {"input": {"paths": [str(folder)]}, "steps": [{"kind": "gopher_quality"}], "out": settings["out"]}
    run(settings)
    with pytest.raises(ConfigError, match=r"begun with other configuration \(steps.0.min_doc_words differs\)"):
        run(settings | {"steps": [{"kind": "gopher_quality", "min_doc_words": 20}]})
    (folder / "b.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"begun with other input files \(.*b.jsonl differs\)"):
        run(settings)
    (folder / "b.jsonl").unlink()
    (Path(settings["out"]) / "data" / "00000.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"00000.parquet is not what was written"):
        run(settings)
    with pytest.raises(ConfigError, match="holds something else"):
        run(settings | {"out": str(folder)})


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    settings = small(tmp_path, {"a": page(0)}, [{"kind": "length"}])
    run(settings)
    (tmp_path / "out" / "prep_report.json").unlink()
    with open(tmp_path / "out" / "prep.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being prepared by another process"):
            run(settings)


class Killed:
    """A block that does not survive its second task."""

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_for_memory_is_noticed(tmp_path: Path) -> None:
    passes = [Pass("00-read", 3, [Killed()], str(tmp_path))]
    with pytest.raises(DataError, match="pass 1/1 read: a worker was killed, most likely for memory"):
        run_passes(passes, LocalExecutor(workers=2))
    assert not (tmp_path / "completions" / "00001").exists()


# -- SLURM ----------------------------------------------------------------------------------------------------------

SBATCH = """
import os, re, subprocess, sys
from pathlib import Path
here, script = Path(os.environ["FAKE_SLURM"]), Path(sys.argv[-1]).read_text()
number = len(list(here.glob("job-*")))
(here / f"job-{number}").write_text(" ".join(sys.argv[1:-1]) + "\\n" + script)
if "merge_stats" not in script:
    for index in range(int(re.search(r"--array=0-(\\d+)", script)[1]) + 1):
        job = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "localhost", "RUN_OFFSET": "0"}
        subprocess.run(["bash", sys.argv[-1]], env={**os.environ, **job}, check=True, stdout=2)
print("Submitted batch job", number)
"""
SCONTROL = "print('localhost')"
SRUN = 'import os, sys; at = sys.argv.index("launch_pickled_pipeline"); os.execvp(sys.argv[at], sys.argv[at:])'


def test_slurm_jobs_do_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datatrove's own job scripts and pickles; sbatch and srun are stand-ins that run the scripts here at once."""
    documents = {f"{number}": page(number % 4) for number in range(6)}
    settings = small(tmp_path, documents, [{"kind": "length"}])
    (tmp_path / "in" / "1.jsonl").write_text(json.dumps({"text": page(3)}) + "\n")
    run(settings)
    slurm = {
        "kind": "slurm",
        "partition": "cpu",
        "time": "01:00:00",
        "tasks_per_job": 2,
        "sbatch_args": {"account": "a"},
    }
    settings |= {"out": str(tmp_path / "jobs"), "executor": slurm}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))  # a SLURM may be installed
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        run(settings)
    for name, source in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable} -I\n{source}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert prepare(PrepConfig.model_validate(settings)).report is None
    script = (tmp_path / "jobs" / "work" / "00-read" / "launch_script.slurm").read_text()
    for line in ("--partition=cpu", "--time=01:00:00", "--array=0-0", "--account=a", "--job-name=prep-00-read"):
        assert f"#SBATCH {line}\n" in script
    jobs = [(tmp_path / f"job-{number}").read_text() for number in range(4)]
    assert ["--dependency=afterok" in job.split("\n")[0] for job in jobs[::2]] == [False, True]
    assert contents(tmp_path / "jobs") == contents(tmp_path / "out")
