"""`headrace launch kubernetes`: YAML for a cluster that runs Kubernetes, printed and not submitted.

    headrace launch kubernetes my.yaml --kind jobset --image mill:1 --nodes 2 --claim /runs=runs \\
      run.dir=/runs/mine | kubectl apply -f -

A ConfigMap with the resolved configuration, and a PyTorchJob (Kubeflow's training operator) or a JobSet (the Kubernetes
project's own) with one pod a node, which runs `python -m launch.pod`. The image brings headrace; data and run folder
come from volume claims. Restarts are the cluster's: by exit code, the whole run at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from headrace.errors import ConfigError
from headrace.yaml_file import dump_yaml
from pretrain.config import RunConfig, dump_config

PORT = 29500
CONFIG_FOLDER = "/etc/headrace"
FINAL_CODES = [1, 2, 3]
"""Exit codes that would come again. A traceback is one here: who counts restarts does not see after which step."""


@dataclass(frozen=True)
class PodRequest:
    """What to ask the cluster for."""

    name: str
    image: str
    nodes: int
    gpus_per_node: int
    """0: CPU pods with one process each."""
    namespace: str = ""
    claims: Mapping[str, str] = field(default_factory=dict)
    """Persistent volume claim by the absolute path at which it is mounted."""
    max_restarts: int = 10
    shared_memory_gb: int = 16
    """Size of /dev/shm, which NCCL and data loading use; the default of a container, 64 MB, is too small for NCCL."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes of each pod."""
        return self.gpus_per_node or 1


def check_pods(request: PodRequest) -> None:
    """Raises ConfigError naming the option that cannot be used."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", request.name):
        raise ConfigError(
            f"--name {request.name!r}: at most 40 of a-z, 0-9 and -, beginning with a letter; host names are made of it"
        )
    if not request.image:
        raise ConfigError("--image is missing: the container image that has headrace installed")
    for option, number, least in (
        ("--nodes", request.nodes, 1),
        ("--gpus-per-node", request.gpus_per_node, 0),
        ("--max-restarts", request.max_restarts, 0),
    ):
        if number < least:
            raise ConfigError(f"{option}: at least {least}, got {number}")
    for path in request.claims:
        if not path.startswith("/"):
            raise ConfigError(f"--claim {path}: write /absolute/path=CLAIM")


def render_kubernetes(kind: Literal["pytorchjob", "jobset"], request: PodRequest, config: RunConfig) -> str:
    """Both documents as YAML. Raises ConfigError."""
    check_pods(request)
    folder = config.run.dir
    if not any(f"{folder}/".startswith(path.rstrip("/") + "/") for path in request.claims):
        raise ConfigError(
            f"run.dir: {folder} is on no --claim, so every restart would begin at step 0; mount one, as in "
            f"--claim /runs=CLAIM run.dir=/runs/{request.name}"
        )
    metadata = {"name": request.name} | ({"namespace": request.namespace} if request.namespace else {})
    documents = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"config.yaml": dump_config(config)},
        },
        (_pytorchjob if kind == "pytorchjob" else _jobset)(metadata, request, config),
    ]
    return "---\n".join(dump_yaml(document) for document in documents)


def _pytorchjob(metadata: Mapping[str, str], request: PodRequest, config: RunConfig) -> dict[str, Any]:
    """The operator gives every pod RANK, WORLD_SIZE (of pods), MASTER_ADDR and MASTER_PORT."""
    container = _container(request, config) | {
        "name": "pytorch",  # the operator looks for this name, and for this port
        "ports": [{"name": "pytorchjob-port", "containerPort": PORT}],
    }
    template = {"spec": {"containers": [container], "volumes": _volumes(request)}}
    # ExitCode: 128 and above is tried again, below is final; launch.pod gives our recoverable codes as such.
    role = {"restartPolicy": "ExitCode", "template": template}
    specs = {"Master": {"replicas": 1, **role}}
    if request.nodes > 1:
        specs["Worker"] = {"replicas": request.nodes - 1, **role}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": dict(metadata),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": request.max_restarts},
            "pytorchReplicaSpecs": specs,
        },
    }


def _jobset(metadata: Mapping[str, str], request: PodRequest, config: RunConfig) -> dict[str, Any]:
    """One indexed Job; when a pod fails, the whole set starts again, unless its exit code is final."""
    name = request.name
    container = _container(request, config) | {"name": "trainer", "ports": [{"containerPort": PORT}]}
    container["env"] = [
        *container["env"],
        {"name": "WORLD_SIZE", "value": str(request.nodes)},
        # The set's headless service knows pods by <set>-<job>-<number of job>-<number of pod>.<set>.
        {"name": "MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "MASTER_PORT", "value": str(PORT)},
    ]
    final = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "trainer", "operator": "In", "values": FINAL_CODES},
    }
    job = {
        "parallelism": request.nodes,
        "completions": request.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [final]},
        "template": {
            "spec": {"restartPolicy": "Never", "containers": [container], "volumes": _volumes(request)},
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": dict(metadata),
        "spec": {
            "failurePolicy": {
                "maxRestarts": request.max_restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _container(request: PodRequest, config: RunConfig) -> dict[str, Any]:
    words = ["-m", "launch.pod", str(request.processes), config.run.dir, "train", f"{CONFIG_FOLDER}/config.yaml"]
    mounts = [{"name": "config", "mountPath": CONFIG_FOLDER}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    mounts += [{"name": f"claim-{at}", "mountPath": path} for at, path in enumerate(request.claims)]
    resources = {"limits": {"nvidia.com/gpu": request.gpus_per_node}} if request.gpus_per_node else {}
    return {
        "image": request.image,
        "command": ["python3", *words],
        "env": [{"name": name, "value": value} for name, value in request.environment.items()],
        "resources": resources,
        "volumeMounts": mounts,
    }


def _volumes(request: PodRequest) -> list[dict[str, Any]]:
    memory = {"medium": "Memory", "sizeLimit": f"{request.shared_memory_gb}Gi"}
    return [
        {"name": "config", "configMap": {"name": request.name}},
        {"name": "shared-memory", "emptyDir": memory},
        *(
            {"name": f"claim-{at}", "persistentVolumeClaim": {"claimName": claim}}
            for at, claim in enumerate(request.claims.values())
        ),
    ]
