"""The job script parses and quotes, whatever names it is given."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, parse_directives
from fake_trainer import job, render
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from launch.request import SlurmRequest
from launch.site import Preflight, Site
from launch.slurm import directive

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
    assert (run_dir / "log" / "rank-3.log").read_text().endswith(" rank 3 was here\n")
    assert not list(tmp_path.rglob("pwned"))
    assert parse_directives(script.read_text())["comment"] == name
    output = str(run_dir).replace("%", "%%") + "/log/slurm-%j.log"
    assert parse_directives(script.read_text())["output"] == output


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
        render(request, run_dir, Site())


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
    script = render(request, Path("/r u n"), site)
    check = subprocess.run(["bash", "-n"], input=script.encode("utf-8", "replace"), capture_output=True)
    assert (check.returncode, check.stderr) == (0, b"")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(("runtime", "points"), [(None, 0), ("pyxis", 0), ("apptainer", 3)])
def test_shellcheck_has_nothing_to_say(run_dir: Path, runtime: str | None, points: int) -> None:
    site = Site(setup=["true"], srun=["--x"], environment={"A": "b"}, container_runtime=runtime or "pyxis")
    site = site.model_copy(update={"preflight": Preflight(min_allreduce_gb_per_s=1.0)})
    request = SlurmRequest(nodes=2, gpus_per_node=8, container="image" if runtime else "")
    script = render(request, run_dir, site, points=points)
    check = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert check.stdout == ""


def test_a_site_may_replace_parts_of_the_template(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text('{% extends "slurm.sh.j2" %}{% block main %}exit 7\n{% endblock %}')
    request = SlurmRequest(nodes=2, gpus_per_node=8)
    text = render(request, run_dir, Site(template=str(tmp_path / "own.j2")))
    assert text.endswith("exit 7\n")
    assert "run_task()" in text
    for source, message in (("{% if %}", "line 1"), ("{{ no_such_name }}", "no_such_name")):
        (tmp_path / "own.j2").write_text(source)
        with pytest.raises(ConfigError, match=rf"template {tmp_path}/own.j2.*{message}"):
            render(request, run_dir, Site(template=str(tmp_path / "own.j2")))
    with pytest.raises(ConfigError, match="No such file"):
        render(request, run_dir, Site(template="/no/such/template"))
