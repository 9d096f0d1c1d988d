"""`headrace launch slurm`: what it prints, writes, submits and refuses."""

from pathlib import Path

import pytest
import yaml
from fake_slurm import FakeSlurm, parse_directives
from typer.testing import CliRunner

from headrace.errors import ConfigError, LayoutError
from launch.cli import app
from launch.request import SlurmRequest
from launch.site import Preflight, Site, load_site
from launch.slurm import launch_slurm
from pretrain.config import load_config


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
        assert launch_slurm(config, ["train.steps=9"], SlurmRequest(2, 4), Site(), dry_run=False).jobs == ["4711"]
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
    site = Site(preflight=Preflight(enabled=False))
    launch_slurm(config, [], SlurmRequest(1, 2), site, dry_run=False)
    snapshot = tmp_path / "runs" / "mill" / "launch" / "0001"
    (snapshot / "code" / "pretrain" / "__main__.py").write_text("print('from the snapshot')\n")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").write_text("")
    (tmp_path / "pretrain" / "__main__.py").write_text("print('from the working directory')\n")
    code, _, output = slurm.run(snapshot / "job.sh", nodes=1)
    assert code == 0, output
    assert (tmp_path / "runs" / "mill" / "log" / "rank-1.log").read_text().endswith(" from the snapshot\n")


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
        ("[]", "expected a mapping with keys of: account"),
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
    script = launch_slurm(config, [], SlurmRequest(2, 4), load_site(path), dry_run=True).script
    assert {"exclusive": "", "mem": "0", "qos": "a b"}.items() <= parse_directives(script).items()
    assert "PYTHON=/opt/py\n" in script
    with pytest.raises(ConfigError, match="file not found"):
        load_site(tmp_path / "none.yaml")
