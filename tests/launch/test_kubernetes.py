"""The YAML for Kubernetes: held against schemas, and the pod's program with real processes.

Pods, Jobs and ConfigMaps are held against Kubernetes' own schemas where kubernetes-validate is installed. It has none
of PyTorchJob and JobSet, which are custom resources: of those, the fields that we write are held against a schema kept
here by hand, after their documentation (kubeflow.org/v1, jobset.x-k8s.io/v1alpha2).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from headrace.errors import ConfigError
from launch import pod
from launch.cli import app
from pretrain.config import load_config

METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {"name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}, "namespace": {"type": "string"}},
}


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


REPLICA = closed(
    replicas={"type": "integer", "minimum": 1},
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template={"type": "object", "required": ["spec"]},
)
SCHEMAS = {
    "PyTorchJob": closed(
        apiVersion={"const": "kubeflow.org/v1"},
        kind={"const": "PyTorchJob"},
        metadata=METADATA,
        spec=closed(
            runPolicy=closed(
                cleanPodPolicy={"enum": ["Running", "All", "None"]}, backoffLimit={"type": "integer", "minimum": 0}
            ),
            pytorchReplicaSpecs={**closed(Master=REPLICA, Worker=REPLICA), "required": ["Master"]},
        ),
    ),
    "JobSet": closed(
        apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
        kind={"const": "JobSet"},
        metadata=METADATA,
        spec=closed(
            failurePolicy=closed(
                maxRestarts={"type": "integer", "minimum": 0},
                rules={
                    "items": closed(
                        action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                        onJobFailureReasons={
                            "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]}
                        },
                    )
                },
            ),
            network=closed(enableDNSHostnames={"type": "boolean"}, subdomain={"type": "string"}),
            replicatedJobs={
                "minItems": 1,
                "items": {
                    **closed(
                        name={"pattern": "^[a-z][-a-z0-9]*$"},
                        replicas={"type": "integer", "minimum": 1},
                        template={"type": "object", "required": ["spec"]},
                    ),
                    "required": ["name", "template"],
                },
            },
        ),
    ),
}


def rendered(config: Path, *options: str) -> list[dict[str, Any]]:
    claim = [] if "--claim" in options else ["--claim", "/runs=runs"]
    words = ["kubernetes", str(config), "run.dir=/runs/mill", "--image", "mill:1", "--gpus-per-node", "4"]
    words += [*claim, *options]
    result = CliRunner().invoke(app, words)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return list(yaml.safe_load_all(result.output))


def hold(kind: str, document: dict[str, Any]) -> None:
    jsonschema.validate(document, SCHEMAS[kind])


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template, as a Pod."""
    spec = document["spec"]
    if document["kind"] == "PyTorchJob":
        templates = [role["template"] for role in spec["pytorchReplicaSpecs"].values()]
    else:
        templates = [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template} for template in templates]


@pytest.mark.parametrize("kind", ["PyTorchJob", "JobSet"])
def test_documents_are_valid(config: Path, kind: str) -> None:
    options = ["--kind", kind.lower(), "--nodes", "2", "--namespace", "mills", "--claim", "/runs=runs"]
    settings, document = rendered(config, *options)
    assert document["metadata"] == settings["metadata"] == {"name": "mill", "namespace": "mills"}
    hold(kind, document)
    (config.parent / "again.yaml").write_text(settings["data"]["config.yaml"])
    assert load_config(config.parent / "again.yaml") == load_config(config, ["run.dir=/runs/mill"])
    for each in pods(document):
        (container,) = each["spec"]["containers"]
        assert container["command"][1:6] == ["-m", "launch.pod", "4", "/runs/mill", "train"]
        assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in each["spec"]["volumes"]}
        assert volumes[mounted["/runs"]]["persistentVolumeClaim"] == {"claimName": "runs"}
        assert f"{Path(container['command'][6]).parent}" in mounted


@pytest.mark.parametrize("kind", ["PyTorchJob", "JobSet"])
def test_standard_parts_hold_against_kubernetes_own_schemas(config: Path, kind: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    settings, document = rendered(config, "--kind", kind.lower(), "--nodes", "2", "--claim", "/runs=runs")
    for part in [settings, *pods(document)]:
        validate(part, "1.30", strict=True)
    if kind == "JobSet":
        spec = document["spec"]["replicatedJobs"][0]["template"]["spec"]
        validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}, "1.30", strict=True
        )


def test_the_schemas_kept_here_find_mistakes(config: Path) -> None:
    _, document = rendered(config, "--kind", "jobset")
    for path, value in (
        (("spec", "failurePolicy", "maxRestart"), 1),
        (("spec", "network", "enableDNSHostnames"), "yes"),
    ):
        broken = json.loads(json.dumps(document))
        broken[path[0]][path[1]][path[2]] = value
        with pytest.raises(jsonschema.ValidationError):
            hold("JobSet", broken)


def test_one_node_has_no_workers(config: Path) -> None:
    _, document = rendered(config, "--nodes", "1")
    assert list(document["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "mpijob"], "pytorchjob or jobset"),
        (["--name", "Mill_1"], "host names"),
        (["--image", ""], "--image is missing"),
        (["--nodes", "0"], "--nodes: at least 1"),
        (["--claim", "runs"], "write /absolute/path=CLAIM"),
        (["--claim", "runs=x"], "write /absolute/path=CLAIM"),
        (["--nodes", "3"], "12"),
    ],
)
def test_bad_requests_are_one_line(config: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rendered(config, *options)


def test_codes_that_may_pass_are_those_that_kubernetes_tries_again() -> None:
    codes = {0: 0, 1: 1, 2: 2, 3: 3, 4: 132, 5: 133, -9: 137, 137: 137}
    assert {code: pod.exit_code(code) for code in codes} == codes


@pytest.mark.parametrize("variable", ["RANK", "JOB_COMPLETION_INDEX"])
def test_a_pod_starts_its_share_of_the_processes(tmp_path: Path, variable: str) -> None:
    """Real processes, of a package `pretrain` that only says where it is."""
    (tmp_path / "trainer.py").write_text(
        "import os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')\n"
        "print(*(os.environ[name] for name in names), sys.argv[1:], flush=True)\n"
        "sys.exit(4)\n"
    )
    code = (
        "import sys\nfrom launch import pod\nreal = pod.start_processes\n"
        f"swap = lambda command: [sys.executable, '-IS', {str(tmp_path / 'trainer.py')!r}, *command[3:]]\n"
        "pod.start_processes = lambda command, *a, **k: real(swap(command), *a, **k)\n"
        f"sys.exit(pod.main('2', {str(tmp_path)!r}, 'train', 'c.yaml'))"
    )
    place = {variable: "1", "WORLD_SIZE": "3", "MASTER_ADDR": "mill-0", "MASTER_PORT": "29500"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root, **place}, capture_output=True)
    assert done.returncode == 132, done.stderr
    for local, rank in enumerate((2, 3)):
        said = (tmp_path / "log" / f"rank-{rank}.log").read_text()
        assert said == f"{rank} {local} 6 mill-0 ['train', 'c.yaml']\n"


@pytest.mark.parametrize("claim", ["/data=data", "/run=runs", "/runs/mill/log=log"])
def test_a_run_folder_that_would_be_lost_is_refused(config: Path, claim: str) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.dir: /runs/mill is on no --claim, so every restart would begin at step 0"
    ):
        rendered(config, "--claim", claim)
