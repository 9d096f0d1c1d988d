"""What works on this machine, what does not, and what to do about it.

`examine()` looks at versions here, and at everything that runs native code in a child process (`python -m
pretrain.doctor FOLDER`): a kernel built for another machine kills the process that calls it, and a network that is
set up wrongly hangs it. The child says what it begins before it begins it, so either becomes one line here.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

PROBE_TIMEOUT_S = 180.0
"""The child takes 9 s on two cores, 7 of them to import torch and megatron-core; this is for a hang."""
MIN_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """One line of the answer."""

    group: str
    name: str
    state: Literal["ok", "off", "failed"]
    """`off`: an optional part that is not there; `failed`: a required one, or one that is there and broken."""
    detail: str
    """What was found; for `off` what happens instead, for `failed` what to do."""


@dataclass(frozen=True)
class Package:
    """A package and what it is for."""

    name: str
    extra: str | None
    """Extra of headrace that brings it; "" for a dependency of headrace itself, None when it is installed apart."""
    required: bool
    without: str
    """What is lost without it."""


PACKAGES = (
    Package("torch", "train", True, "no training"),
    Package("megatron-core", "train", True, "no training"),
    Package("numpy", "", True, "nothing works"),
    Package("pyarrow", "", True, "no parquet sources"),
    Package("tokenizers", "", True, "no encoding"),
    Package("gigatoken", "", False, "encoding by tokenizers, 40 to 100 times slower"),
    Package("transformers", "train", False, "no test of converted checkpoints"),
    Package("sentencepiece", "train", False, "no SentencePiece tokenizers"),
    Package("safetensors", "train", False, "no conversion to and from Hugging Face"),
    Package("matplotlib", "train", False, "no plot in headrace report"),
    Package("prometheus-client", "train", False, "no Prometheus endpoint"),
    Package("wandb", "trackers", False, "no wandb tracking"),
    Package("tensorboard", "trackers", False, "no TensorBoard files"),
    Package("datatrove", "prep", False, "no filtering and deduplication pipelines"),
    Package("flash-attn", "gpu", False, "attention by torch"),
    Package("transformer-engine", None, False, "Adam by torch"),
)


def examine(probe: list[str] | None = None, timeout_s: float = PROBE_TIMEOUT_S) -> Iterator[Check]:
    """Every check, as soon as it is known. `probe` replaces the command of the child process."""
    yield from _python()
    for package in PACKAGES:
        yield check_package(package)
    yield check_apex()
    yield from _compilers()
    with tempfile.TemporaryDirectory(prefix="headrace-doctor-") as folder:
        yield from run_probe([*(probe or [sys.executable, "-m", "pretrain.doctor"]), folder], timeout_s)


def _python() -> Iterator[Check]:
    version = platform.python_version()
    if sys.version_info >= MIN_PYTHON:
        yield Check("versions", "python", "ok", f"{version} on {platform.platform(terse=True)}")
    else:
        wanted = ".".join(map(str, MIN_PYTHON))
        yield Check("versions", "python", "failed", f"{version}; install Python {wanted} or newer")


def check_package(package: Package) -> Check:
    """The installed version of one package, or how to get it."""
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        if package.extra is None:
            how = f"pip install {package.name}"
        else:
            how = f"pip install 'headrace[{package.extra}]'" if package.extra else "pip install headrace"
        state: Literal["failed", "off"] = "failed" if package.required else "off"
        return Check("versions", package.name, state, f"not installed: {package.without}; {how}")
    return Check("versions", package.name, "ok", version)


def check_apex() -> Check:
    """NVIDIA's apex; the package of that name in the Python index is another project, which has no `amp_C`."""
    if importlib.util.find_spec("apex") is None:
        return Check("versions", "apex", "off", "not installed: Adam by torch; build NVIDIA's from source")
    if importlib.util.find_spec("amp_C") is None or not _has_module("apex.optimizers"):
        why = (
            "this is not NVIDIA's apex, or built without --cuda_ext: not used; pip uninstall apex if you do not need it"
        )
        return Check("versions", "apex", "off", why)
    return Check("versions", "apex", "ok", "NVIDIA's, with CUDA extensions")


def _has_module(name: str) -> bool:
    """Whether a submodule exists; looking for it imports its parent, which may fail in any way."""
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:
        return False


def _compilers() -> Iterator[Check]:
    compiler = shutil.which("c++") or shutil.which("g++")
    found = _first_line([compiler, "--version"]) if compiler else ""
    missing = "no C++ compiler: our own kernels cannot be built; apt-get install g++"
    yield Check("compilers", "c++", "ok" if found else "off", found or missing)
    nvcc = shutil.which("nvcc")
    release = _first_line([nvcc, "--version"], "release") if nvcc else ""
    yield Check(
        "compilers", "nvcc", "ok" if release else "off", release or "not found: needed to build CUDA kernels only"
    )


def _first_line(command: list[str], containing: str = "") -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in answer.stdout.splitlines() if containing in line]
    return lines[0] if lines and answer.returncode == 0 else ""


def run_probe(command: list[str], timeout_s: float) -> Iterator[Check]:
    """The checks of the child process `command`, and one more when it crashed or hung."""
    # A doctor called inside a job must not wait for the job's other processes.
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    hung = False
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        hung = True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if hung:
        out, err = process.communicate()
    doing = "starting"
    for line in out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if "begin" in said:
            doing = said["begin"]
        else:
            yield Check(**said)
    if hung:
        yield Check("self-test", doing, "failed", f"no answer within {timeout_s:.0f} s; it hangs in this part")
    elif process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        what = "a package built for another kind of machine does this" if name in ("SIGILL", "SIGSEGV") else "killed"
        yield Check("self-test", doing, "failed", f"the process died with {name}; {what}")
    elif process.returncode:
        last = (err.strip().splitlines() or ["no message"])[-1]
        yield Check("self-test", doing, "failed", last)


# --- in the child process ---


def probe(folder: Path) -> None:
    """Run the parts that could crash or hang, in order, with one JSON line before and after each."""
    for group, name, part in (
        ("device", "device", _device),
        ("device", "megatron-core", _engine),
        ("kernels", "attention", _attention),
        ("kernels", "optimizer", _optimizer),
        ("kernels", "our own", _own_kernels),
        ("kernels", "data loops", _loops),
        ("self-test", "files", _files),
        ("self-test", "encoder", _encoder),
        ("self-test", "training", _training),
    ):
        _say({"begin": name})
        try:
            check = Check(group, name, "ok", part(folder))
        except Exception as error:
            message = " ".join(str(error).split()) or type(error).__name__
            check = Check(group, name, "failed", message)
        _say(asdict(check))
        if check.state == "failed" and group == "device":
            return  # all that follows would only fail too


def _say(line: dict[str, str]) -> None:
    sys.__stdout__.write(json.dumps(line) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def _device(folder: Path) -> str:
    from parallel import accelerator

    return ", ".join(f"{name} {value}" if name != "device" else value for name, value in accelerator.describe().items())


def _engine(folder: Path) -> str:
    from parallel import accelerator, engine

    how = "as it is" if accelerator.has_gpu() else "redirected to the CPU, see parallel/accelerator.py"
    return f"{engine.MEGATRON_VERSION} imported, {how}"


def _attention(folder: Path) -> str:
    import torch

    from parallel import accelerator
    from parallel.attention import active_kernel

    half, full = active_kernel(torch.bfloat16), active_kernel(torch.float32)
    if half == full:
        why = "in fp32" if accelerator.has_gpu() else "varlen kernels need a GPU"
        return f"{full}; {why}"
    flash = "" if importlib.util.find_spec("flash_attn") else " (flash-attn is not installed)"
    return f"bf16: {half}{flash}; fp32: {full}"


def _optimizer(folder: Path) -> str:
    from parallel.engine import uses_own_adam

    if uses_own_adam():
        return "torch's fused AdamW (parallel/adam.py); neither TransformerEngine nor apex is there"
    return "fused Adam of TransformerEngine or apex"


def _own_kernels(folder: Path) -> str:
    from parallel import accelerator
    from parallel.kernels.choice import available

    return "; ".join(f"{name} {what}" for name, what in available(accelerator.device().type).items())


def _loops(folder: Path) -> str:
    from data_scheduler import sequences

    return (
        "compiled"
        if sequences.NATIVE
        else "numpy; for compiled ones install again, with a C compiler and Python's headers"
    )


def _files(folder: Path) -> str:
    content = os.urandom(1 << 20)
    written = folder / "file.new"
    with written.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    kept = written.replace(folder / "file")
    if kept.read_bytes() != content:
        raise OSError(f"{kept} reads back differently; is the disk behind {folder.parent} sound?")
    return f"1 MiB written, renamed and read back in {folder.parent}"


def _texts() -> list[str]:
    """Some 80 documents of this package's own source code."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return [part for path in sources for part in path.read_text(encoding="utf-8").split("\n\n\n") if part.strip()]


def _encoder(folder: Path) -> str:
    from data_scheduler.encoder import load_encoder
    from data_scheduler.tokenizer_training import train_tokenizer

    texts = _texts()
    train_tokenizer(texts, 512, folder / "tokenizer")
    encoder = load_encoder(folder / "tokenizer", samples=texts)
    tokens, offsets = encoder.encode_batch(texts)
    for at, text in enumerate(texts):
        if encoder.decode(tokens[offsets[at] : offsets[at + 1]]) != text:
            raise ValueError(f"{encoder.name} does not give back the text it was given; reinstall tokenizers")
    slow = "" if encoder.name == "gigatoken" else " (the fast encoder is off)"
    return f"{encoder.name}{slow}: {len(texts)} documents to {len(tokens):,} tokens and back"


def _training(folder: Path) -> str:
    import math

    from pretrain.config import validate_config
    from pretrain.metrics import read_records
    from pretrain.train import train

    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts()))
    tokenizer = folder / "tokenizer"
    model = {"family": "llama", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
    source = {"name": "own-code", "paths": [str(folder / "text.jsonl")]}
    data = {"tokenizer": str(tokenizer), "sources": [source], "seq_len": 64, "global_batch_size": 4, "lanes": 4}
    settings = {
        "run": {"dir": str(folder / "run")},
        "model": model,
        "data": {**data, "chunk_bytes": 4096},
        "train": {"steps": 3, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-2},
        "metrics": {"progress": False},
    }
    train(validate_config(settings, "self-test"))
    losses = [record["loss"] for record in read_records(folder / "run" / "metrics.jsonl") if "loss" in record]
    if len(losses) != 3 or not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise ValueError(f"three steps gave the losses {losses}; they should fall. Please report this with this output")
    saved = next((folder / "run" / "checkpoints").iterdir()).name
    return f"3 steps from text to {saved}, loss {losses[0]:.2f} to {losses[-1]:.2f}"


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
