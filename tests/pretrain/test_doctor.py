"""The doctor: everything tried for real once, and every way to be ill becomes one line."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import doctor
from pretrain.doctor import PACKAGES, Check, Package, check_apex, check_package, examine, run_probe


@pytest.mark.slow
def test_everything_required_works_here() -> None:
    """The real child process: device, kernels, encoder round trip, three training steps. Also inside a job."""
    environment = {**os.environ, "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    code = "import json; from dataclasses import asdict; from pretrain.doctor import examine\n"
    code += "print('CHECKS', json.dumps([asdict(check) for check in examine()]))"
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    checks = [Check(**check) for check in json.loads(child.stdout.partition("CHECKS ")[2])]
    assert [check for check in checks if check.state == "failed"] == []
    found = {(check.group, check.name): check for check in checks}
    for name in ("files", "encoder", "training"):
        assert found["self-test", name].state == "ok"
    assert "3 steps from text to step-" in found["self-test", "training"].detail
    assert "documents to" in found["self-test", "encoder"].detail
    assert found["kernels", "attention"].detail
    assert len(found) == len(checks), "a name stands twice in its group"


def test_packages_of_the_metadata_are_known_by_their_names() -> None:
    """A misspelt name here would be reported as not installed for ever."""
    pyproject = (Path(doctor.__file__).parents[1] / "pyproject.toml").read_text()
    for package in PACKAGES:
        if package.extra is not None:
            assert f'"{package.name}' in pyproject, package


def test_a_missing_package_says_what_is_lost_and_how_to_get_it() -> None:
    missing = Package("no-such-package", "trackers", False, "no tracking")
    assert check_package(missing).state == "off"
    assert check_package(missing).detail == "not installed: no tracking; pip install 'headrace[trackers]'"
    assert check_package(Package("no-such-package", "", True, "nothing works")).state == "failed"
    assert check_package(Package("pytest", "dev", True, "")).detail == importlib.metadata.version("pytest")


def apex_in(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Check:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    try:
        return check_apex()
    finally:
        sys.modules.pop("apex", None)


def test_another_project_called_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = apex_in(tmp_path, {"apex/__init__.py": "raise RuntimeError('pyramid is missing')"}, monkeypatch)
    assert (check.state, "not NVIDIA's" in check.detail) == ("off", True)


def test_apex_without_its_optimizers_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"apex/__init__.py": "raise RuntimeError('broken')", "amp_C.py": ""}
    assert apex_in(tmp_path, files, monkeypatch).state == "off"


def test_apex_without_cuda_extensions_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"apex/__init__.py": "", "apex/optimizers/__init__.py": ""}
    assert apex_in(tmp_path, files, monkeypatch).state == "off"


def test_the_real_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": ""}
    assert apex_in(tmp_path, files, monkeypatch).state == "ok"


OK = json.dumps({"group": "device", "name": "device", "state": "ok", "detail": "cpu"})
BEGIN = 'print(\'{"begin": "training"}\', flush=True)'


def probe_of(code: str, timeout_s: float = 60.0) -> list[Check]:
    return list(run_probe([sys.executable, "-I", "-S", "-c", code], timeout_s))


def test_a_child_that_dies_is_one_line_with_the_part_it_died_in() -> None:
    checks = probe_of(f"print({OK!r})\n{BEGIN}\nimport os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    assert [check.state for check in checks] == ["ok", "failed"]
    assert (checks[1].name, "SIGILL" in checks[1].detail) == ("training", True)
    assert "another kind of machine" in checks[1].detail


def test_a_child_that_hangs_is_ended_and_its_answers_kept() -> None:
    checks = probe_of(f"print({OK!r})\n{BEGIN}\nimport time\ntime.sleep(600)", timeout_s=1.0)
    assert [(check.name, check.state) for check in checks] == [("device", "ok"), ("training", "failed")]
    assert "hangs" in checks[1].detail


def test_a_child_that_raises_shows_its_last_line() -> None:
    (check,) = probe_of("print('a library says hello')\nraise ImportError('no libnccl')")
    assert (check.name, check.detail) == ("starting", "ImportError: no libnccl")


def test_a_part_that_fails_does_not_hide_the_next(tmp_path: Path, monkeypatch, capsys) -> None:
    said: list[dict] = []

    def fail(folder: Path) -> str:
        raise OSError("the disk is\nfull")

    monkeypatch.setattr(doctor, "_say", said.append)
    for name in ("_device", "_engine", "_attention", "_optimizer", "_encoder", "_training"):
        monkeypatch.setattr(doctor, name, lambda folder: "fine")
    monkeypatch.setattr(doctor, "_files", fail)
    doctor.probe(tmp_path)
    states = {check["name"]: (check["state"], check["detail"]) for check in said if "state" in check}
    assert states["files"] == ("failed", "the disk is full")
    assert states["training"] == ("ok", "fine")
    said.clear()
    monkeypatch.setattr(doctor, "_engine", fail)  # without an engine all else would only fail too
    doctor.probe(tmp_path)
    assert [check["name"] for check in said if "state" in check] == ["device", "megatron-core"]


@pytest.mark.parametrize(("code", "exit_code"), [(f"print({OK!r})", 0), ("raise ImportError('no libnccl')", 2)])
def test_the_exit_code_says_whether_all_required_parts_work(monkeypatch, code: str, exit_code: int) -> None:
    from typer import Typer
    from typer.testing import CliRunner

    from pretrain.cli.doctor import doctor as command

    probe = [sys.executable, "-I", "-S", "-c", code]
    monkeypatch.setattr(doctor, "examine", lambda: examine(probe))
    app = Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == exit_code, result.output
    if exit_code:
        assert "starting: ImportError: no libnccl" in result.output
