"""The job script: it parses, it quotes, and it runs, with stand-ins for SLURM's programs and real processes."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from fake_slurm import PYTHON, FakeSlurm
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from headrace.errors import ConfigError, LayoutError
from launch.cli import app
from launch.site import Site, load_site
from launch.slurm import SlurmRequest, directive, launch_slurm, render_script
from pretrain.config import load_config

CONFIG = """
run: {dir: RUN}
model: {family: llama, num_layers: 4, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128}
data: {tokenizer: t.json, sources: [{name: a, paths: [a.jsonl]}], seq_len: 64, global_batch_size: 8, lanes: 8}
train: {steps: 2}
"""

# Stands in for the interpreter, so for the trainer. `plan` has one JSON list a run, by rank: a number is exited with,
# "kill" and "wait" mean what they say, "save" waits for USR1, "peer" leaves with 1 once the killed are gone.
# Nobody leaves before all have started, and who leaves with a number is not disturbed by the end of others.
TRAINER = r"""
import json, os, signal, sys, time
from pathlib import Path
here, rank = Path(os.environ["FAKE_SLURM"]), int(os.environ["RANK"])
got = []
signal.alarm(60)  # whatever goes wrong, no child waits for ever
signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
seen = {name: os.environ[name] for name in names} | {"argv": sys.argv[1:], "cwd": os.getcwd()}
seen |= {"PYTHONPATH": os.environ["PYTHONPATH"], "MILL": os.environ.get("MILL")}
(here / f"seen-{rank}").write_text(json.dumps(seen))
print("rank", rank, "was here", flush=True)
plan = json.loads((here / "plan").read_text())[int(os.environ["SLURM_RESTART_COUNT"])]
for name in plan.get("saves", []) if rank == 0 else []:
    (Path(os.environ["LOG_DIR"]).parent / "checkpoints" / name).mkdir(parents=True)
do = plan["codes"][rank]
if do != "wait":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
started = [here / f"started-{os.environ['SLURM_RESTART_COUNT']}-{r}" for r in range(int(os.environ["WORLD_SIZE"]))]
started[rank].touch()
while not all(path.exists() for path in started):
    time.sleep(0.01)
if do == "peer":
    while not (here / "killed-2").exists() or not (here / "killed-3").exists():
        time.sleep(0.01)
    do = 1
if do == "kill":
    (here / f"killed-{rank}").touch()
    os.kill(os.getppid(), signal.SIGKILL)  # with the shell around us: the node is gone
    os.kill(os.getpid(), signal.SIGKILL)
while do == "wait" or (do == "save" and not got):
    time.sleep(0.01)
if do == "save":
    (here / f"saved-{rank}").write_text(" ".join(got))
    do = 0
sys.exit(do)
"""


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "mill"
    (path / "log").mkdir(parents=True)
    return path


def job(slurm: FakeSlurm, run_dir: Path, plan: list, site: Site | None = None, **options) -> Path:
    """A job script of 2 nodes with 2 processes each whose trainer follows `plan`."""
    runs = [item if isinstance(item, dict) else {"codes": item} for item in plan]
    (slurm.here / "plan").write_text(json.dumps(runs))
    python = str(slurm.program("trainer", PYTHON + TRAINER))
    site = (site or Site()).model_copy(update={"python": python})
    request = SlurmRequest(**{"nodes": 2, "gpus_per_node": 2, **options})
    path = run_dir / "job.sh"
    path.write_text(render_script(request, run_dir, run_dir / "launch" / "0001", run_dir.parent, site))
    return path


def test_every_process_finds_its_place(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [[0, 0, 0, 0]], Site(environment={"MILL": "a 'b' $c"}, srun=["--cpu-bind=none"]))
    code, runs, output = slurm.run(script, nodes=2)
    assert (code, runs) == (0, 1), output
    seen = [json.loads((slurm.here / f"seen-{rank}").read_text()) for rank in range(4)]
    assert seen == [
        {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "10.1.2.3",  # the node's name does not resolve: SLURM's own address of it
            "MASTER_PORT": str(12000 + 40123 % 20000),
            "OMP_NUM_THREADS": "1",
            "argv": ["-P", "-m", "pretrain", "train", str(run_dir / "launch" / "0001" / "config.yaml")],
            "cwd": str(run_dir.parent),
            "PYTHONPATH": seen[0]["PYTHONPATH"],
            "MILL": "a 'b' $c",
        }
        for rank in range(4)
    ]
    assert seen[0]["PYTHONPATH"].split(":")[0] == str(run_dir / "launch" / "0001" / "code")
    for rank in range(4):
        assert (run_dir / "log" / f"rank-{rank}.log").read_text() == f"rank {rank} was here\n"
        assert (run_dir / "log" / f"exit-{rank}").read_text() == "0\n"
    assert "--cpu-bind=none" in (slurm.here / "srun-options").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([0, 2, 0, 0], 2),
        ([0, 0, 0, 3], 3),
        ([4, 4, 3, 4], 3),  # peers only lost their connection
        (["wait", 1, "wait", "wait"], 1),  # a fault of ours: the same again next time
    ],
)
def test_what_would_fail_again_ends_the_job(slurm: FakeSlurm, run_dir: Path, codes: list, verdict: int) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [codes]), nodes=2)
    assert (code, runs) == (verdict, 1), output
    assert re.search(rf"rank \d .*exit code {verdict}, see {re.escape(str(run_dir))}/log/rank-\d.log", output)


@pytest.mark.parametrize("codes", [[4, "wait", 0, 0], [0, 5, 0, "wait"], ["wait", 137, "wait", "wait"]])
def test_what_may_pass_is_requeued(slurm: FakeSlurm, run_dir: Path, codes: list) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [codes, [0, 0, 0, 0]]), nodes=2)
    assert (code, runs) == (0, 2), output
    assert "failure 1 of at most 3" in output
    assert not (run_dir / "log" / "failures").exists()


def test_a_lost_node_is_requeued(slurm: FakeSlurm, run_dir: Path) -> None:
    """Its processes leave no note; what their peers report is not the reason."""
    code, runs, output = slurm.run(job(slurm, run_dir, [["wait", "peer", "kill", "kill"], [0, 0, 0, 0]]), nodes=2)
    assert (code, runs) == (0, 2), output
    assert "2 of 4 processes left no exit code" in output


def test_it_gives_up_without_progress(slurm: FakeSlurm, run_dir: Path) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [[5, 0, 0, 0]] * 5, max_failures=2), nodes=2)
    assert (code, runs) == (5, 3), output
    assert "failed 3 times without a new checkpoint; giving up" in output


def test_a_new_checkpoint_makes_the_count_start_again(slurm: FakeSlurm, run_dir: Path) -> None:
    failing = [4, 0, 0, 0]
    plan = [
        failing,
        {"codes": failing, "saves": ["step_0000009"]},
        {"codes": failing, "saves": ["step_0000010"]},
        failing,
        failing,
    ]
    code, runs, output = slurm.run(job(slurm, run_dir, plan, max_failures=2), nodes=2)
    assert (code, runs) == (4, 5), output


def test_the_time_limit_saves_and_requeues_without_counting_as_a_failure(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [["save"] * 4, [0, 0, 0, 0]])
    process = slurm.start(script, nodes=2)
    limit = time.monotonic() + 60
    while not all((slurm.here / f"seen-{rank}").exists() for rank in range(4)):
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert slurm.was_requeued(), output
    assert [(slurm.here / f"saved-{rank}").read_text() for rank in range(4)] == ["USR1"] * 4
    assert "the time limit" in output
    assert not (run_dir / "log" / "failures").exists()
    process = slurm.start(script, nodes=2, restarts=1)
    assert "start 1: 4 processes" in process.communicate()[0]
    assert process.returncode == 0


def test_a_refused_requeue_says_what_to_do(slurm: FakeSlurm, run_dir: Path) -> None:
    (slurm.here / "no-requeue").touch()
    code, runs, output = slurm.run(job(slurm, run_dir, [[4, 0, 0, 0]]), nodes=2)
    assert (code, runs) == (4, 1)
    assert "submit it again with: sbatch" in output


def test_notes_of_an_earlier_run_are_not_believed(slurm: FakeSlurm, run_dir: Path) -> None:
    """Neither exit codes of processes that now leave none, nor whose failure was the first last time."""
    for rank in range(8):
        (run_dir / "log" / f"exit-{rank}").write_text("3\n")
    plan = [["wait", "peer", "kill", "kill"], ["wait", 4, "wait", "wait"], [0, 0, 0, 0]]
    code, runs, output = slurm.run(job(slurm, run_dir, plan), nodes=2)
    assert (code, runs) == (0, 3), output


def test_heterogeneous_jobs_are_refused(slurm: FakeSlurm, run_dir: Path) -> None:
    process = slurm.start(job(slurm, run_dir, [[0] * 4]), nodes=2, SLURM_HET_SIZE="2")
    assert "heterogeneous jobs are not supported" in process.communicate()[0]
    assert process.returncode == 2


def test_cpu_clusters_choose_their_number_of_processes(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [[0, 0, 0]], nodes=1, gpus_per_node=0, tasks_per_node=3)
    assert "gres" not in script.read_text()
    code, _, output = slurm.run(script, nodes=1)
    assert code == 0, output
    assert json.loads((slurm.here / "seen-2").read_text())["WORLD_SIZE"] == "3"


def test_a_container_gets_its_image_and_mounts(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(container_mounts=["/data:/data:ro"])
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], site, container="/img/a b.sqsh"), nodes=2)
    assert code == 0, output
    options = (slurm.here / "srun-options").read_text().splitlines()
    assert "--container-image=/img/a b.sqsh" in options
    parent = run_dir.parent
    assert f"--container-mounts={run_dir}:{run_dir},{parent}:{parent},/data:/data:ro" in options
    assert f"--container-workdir={parent}" in options
    request = SlurmRequest(nodes=1, gpus_per_node=1, container="x")
    assert "COMMAND=(python3 " in render_script(request, run_dir, run_dir / "launch" / "0001", parent, Site())


def test_setup_lines_run_first_and_may_use_unset_variables(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(setup=['echo "setup says $NO_SUCH_VARIABLE hello"'])
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], site), nodes=2)
    assert code == 0
    assert "setup says  hello" in output
    assert output.index("setup says") < output.index("start 0")


HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "a'b",
    'a"b',
    "a;touch pwned",
    "a b  c",
    "-rf",
    "a\\",
    "#x",
    "%j",
    "é$é",
    "!!",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_names(tmp_path: Path, name: str) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    run_dir = tmp_path / "runs" / name
    (run_dir / "log").mkdir(parents=True)
    site = Site(environment={"MILL": name}, srun=[f"--comment={name}"], sbatch={"comment": name})
    script = job(slurm, run_dir, [[0] * 4], site, container=name, partition=name, account=name, job_name=name)
    code, _, output = slurm.run(script, nodes=2)
    assert code == 0, output
    assert json.loads((slurm.here / "seen-3").read_text())["MILL"] == name
    options = (slurm.here / "srun-options").read_text().splitlines()
    assert {f"--comment={name}", f"--container-image={name}"} <= set(options)
    assert (run_dir / "log" / "rank-3.log").read_text() == "rank 3 was here\n"
    assert not list(tmp_path.rglob("pwned"))
    assert parse_directives(script.read_text())["comment"] == name
    output = str(run_dir).replace("%", "%%") + "/log/slurm-%j.log"
    assert parse_directives(script.read_text())["output"] == output


def parse_directives(script: str) -> dict[str, str]:
    """Options as sbatch 22.05 reads them: a space ends a word unless quoted, a backslash escapes all but a space, `#`
    at the start of a word ends the line."""
    found = {}
    for line in script.splitlines():
        if not line.startswith("#SBATCH"):
            continue
        rest, words = line.removeprefix("#SBATCH").lstrip(), []
        while rest and not rest.startswith("#"):
            word, quote, escaped, at = "", "", False, 0
            while at < len(rest) and (quote or not rest[at].isspace()):
                character = rest[at]
                if escaped:
                    word, escaped = word + character, False
                elif character == "\\":
                    escaped = True
                elif quote and character == quote:
                    quote = ""
                elif not quote and character in "\"'":
                    quote = character
                else:
                    word += character
                at += 1
            assert not quote, line
            words, rest = [*words, word], rest[at:].lstrip()
        assert len(words) == 1, line
        name, _, value = words[0].removeprefix("--").partition("=")
        found[name] = value
    return found


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1))
def test_any_printable_text_survives_a_directive(text: str) -> None:
    if not text.isprintable():  # spaces other than the plain one: sbatch would take them for separators or not
        with pytest.raises(ConfigError):
            directive("comment", text)
    else:
        assert parse_directives(directive("comment", text)) == {"comment": text}


@pytest.mark.parametrize("option", ["partition", "account", "job_name", "container"])
def test_line_breaks_are_refused(run_dir: Path, option: str) -> None:
    request = SlurmRequest(nodes=1, gpus_per_node=1, **{option: "a\n#SBATCH --wrap=x"})
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}"):
        render_script(request, run_dir, run_dir / "launch" / "0001", run_dir, Site())


@settings(max_examples=20, deadline=None)
@given(
    st.builds(
        Site,
        environment=st.dictionaries(
            st.from_regex(r"[A-Z_]{1,5}", fullmatch=True), st.text(st.characters(exclude_characters="\0"))
        ),
        srun=st.lists(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8), max_size=3
        ),
    ),
    st.booleans(),
)
def test_the_script_always_parses(site: Site, container: bool) -> None:
    request = SlurmRequest(nodes=3, gpus_per_node=8, container="img" if container else "")
    script = render_script(request, Path("/r u n"), Path("/r u n/launch/0001"), Path("/w"), site)
    check = subprocess.run(["bash", "-n"], input=script.encode("utf-8", "replace"), capture_output=True)
    assert (check.returncode, check.stderr) == (0, b"")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("container", ["", "image"])
def test_shellcheck_has_nothing_to_say(run_dir: Path, container: str) -> None:
    site = Site(setup=["true"], srun=["--x"], environment={"A": "b"})
    request = SlurmRequest(nodes=2, gpus_per_node=8, container=container)
    script = render_script(request, run_dir, run_dir / "launch" / "0001", run_dir, site)
    check = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert check.stdout == ""


# --- the command ---


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mill.yaml"
    path.write_text(CONFIG.replace("RUN", "runs/mill"))
    return path


def test_a_dry_run_prints_the_script_and_writes_nothing(config: Path, tmp_path: Path) -> None:
    arguments = ["slurm", str(config), "--nodes", "4", "--gpus-per-node", "2", "--partition", "gpu", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    options = parse_directives(result.output)
    assert options == {
        "job-name": "mill",
        "nodes": "4",
        "ntasks-per-node": "2",
        "time": "24:00:00",
        "gres": "gpu:2",
        "partition": "gpu",
        "output": f"{tmp_path}/runs/mill/log/slurm-%j.log",
        "signal": "B:USR1@120",
        "requeue": "",
        "open-mode": "append",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["mill.yaml"]


def test_submitting_takes_a_snapshot(config: Path, slurm: FakeSlurm, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", slurm.environment()["PATH"])
    monkeypatch.setenv("FAKE_SLURM", str(slurm.here))
    for number in ("0001", "0002"):
        assert launch_slurm(config, ["train.steps=9"], SlurmRequest(2, 4), Site(), dry_run=False) == "4711"
        snapshot = tmp_path / "runs" / "mill" / "launch" / number
        assert (snapshot / "job-id").read_text() == "4711\n"
        assert (slurm.here / "job.sh").read_text() == (snapshot / "job.sh").read_text()
        assert f"SNAPSHOT={snapshot}\n" in (snapshot / "job.sh").read_text()
        assert load_config(snapshot / "config.yaml").train.steps == 9
        for package in ("headrace", "data_scheduler", "parallel", "pretrain", "launch"):
            assert (snapshot / "code" / package / "__init__.py").exists()
        assert (snapshot / "code" / "launch" / "templates" / "slurm.sh.j2").exists()
        assert not list(snapshot.rglob("__pycache__"))
    (slurm.here / "refuse").touch()
    with pytest.raises(ConfigError, match=r"sbatch refused .*Invalid account"):
        launch_slurm(config, [], SlurmRequest(2, 4), Site(), dry_run=False)


def test_the_snapshot_is_what_runs(config: Path, slurm: FakeSlurm, tmp_path: Path, monkeypatch) -> None:
    """Even where the job's working directory holds another version of the code."""
    monkeypatch.setenv("PATH", slurm.environment()["PATH"])
    monkeypatch.setenv("FAKE_SLURM", str(slurm.here))
    launch_slurm(config, [], SlurmRequest(1, 2), Site(), dry_run=False)
    snapshot = tmp_path / "runs" / "mill" / "launch" / "0001"
    (snapshot / "code" / "pretrain" / "__main__.py").write_text("print('from the snapshot')\n")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").write_text("")
    (tmp_path / "pretrain" / "__main__.py").write_text("print('from the working directory')\n")
    code, _, output = slurm.run(snapshot / "job.sh", nodes=1)
    assert code == 0, output
    assert (tmp_path / "runs" / "mill" / "log" / "rank-1.log").read_text() == "from the snapshot\n"


def test_without_sbatch_it_says_so(config: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="sbatch not found"):
        launch_slurm(config, [], SlurmRequest(2, 4), Site(), dry_run=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus-per-node", "4,8"], "nodes cannot differ"),
        (["--nodes", "2:4"], "nodes cannot differ"),
        (["--nodes", "-1"], "--nodes"),
        (["--nodes", "0"], "--nodes: at least 1"),
        (["--tasks-per-node", "3"], "one process per GPU"),
        (["--time", "soon"], "--time 'soon'"),
        (["--nodes", "3", "--gpus-per-node", "1"], "3"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(config: Path, tmp_path: Path, options, message: str) -> None:
    result = CliRunner().invoke(app, ["slurm", str(config), "--gpus-per-node", "4", *options])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mill.yaml"]


def test_a_layout_that_does_not_fit_the_cluster_is_refused(config: Path) -> None:
    with pytest.raises(LayoutError):
        launch_slurm(config, ["parallel.tensor_parallel_size=8"], SlurmRequest(1, 4), Site(), dry_run=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sbatch: {nodes: 4}", "set by `headrace launch slurm` itself"),
        ("sbatch: {'x y': 4}", "x y"),
        ("enviroment: {A: b}", r"unknown key enviroment \(did you mean 'environment'\?\)"),
        ("environment: {'A;B': b}", "A;B"),
        ("a: [", "not valid YAML"),
        ("[]", "expected a mapping with keys of: sbatch"),
    ],
)
def test_a_bad_site_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_site(path)


def test_a_site_file_adds_its_options(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"sbatch": {"exclusive": True, "mem": 0, "qos": "a b"}, "python": "/opt/py"}))
    script = launch_slurm(config, [], SlurmRequest(2, 4), load_site(path), dry_run=True)
    assert {"exclusive": "", "mem": "0", "qos": "a b"}.items() <= parse_directives(script).items()
    assert "COMMAND=(/opt/py -P -m pretrain train " in script
    with pytest.raises(ConfigError, match="file not found"):
        load_site(tmp_path / "none.yaml")
