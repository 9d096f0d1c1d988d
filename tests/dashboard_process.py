"""A dashboard in a process of its own, and a stored small run for it to show."""

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import child_process
import pytest

from data_scheduler.journal import Journal
from pretrain.metrics.jsonl import JsonlSink

TOKEN = "a-token-for-tests-0123456789"
PATIENCE_S = 60
"""A request that is held up, by a named pipe for one, ends as a failure."""


@contextlib.contextmanager
def dashboard(root: Path, token: str, work: Path) -> Iterator[str]:
    """The address, `http://127.0.0.1:port`, of a dashboard of `root`; it ends with the block."""
    pytest.importorskip("uvicorn")
    from pretrain.monitor.serve import serve

    told, log = work / "dashboard-address", work / "dashboard.log"
    told.unlink(missing_ok=True)

    def say(address: str) -> None:
        told.with_suffix(".new").write_text(address)
        told.with_suffix(".new").rename(told)

    pid = child_process.start(lambda: serve(root, "127.0.0.1", 0, token, say), log)
    try:
        deadline = time.monotonic() + 120
        while not told.exists():
            assert time.monotonic() < deadline, log.read_text()
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), log.read_text()
            time.sleep(0.02)
        yield told.read_text().rstrip("/")
    finally:
        os.kill(pid, signal.SIGTERM)
        child_process.wait(pid, 30)


def get(url: str, path: str) -> Any:
    """The JSON that a dashboard without a token answers."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
    connection.request("GET", path)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    assert reply.status == 200, content
    return json.loads(content)


def stored_run(folder: Path, steps: int = 40, sources: tuple[str, ...] = ("code", "prose"), **more: Any) -> Path:
    """A run folder as a run of `steps` steps leaves it, without checkpoints; `more` goes into every record."""
    folder.mkdir(parents=True)
    configured = [{"name": name, "weight": 1.0 / len(sources)} for name in sources]
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps({"train": {"steps": steps}, "data": {"sources": configured}}))
    journal = Journal(folder / "journal.jsonl")
    policy = {"kind": "static", "options": {}}
    journal.append("run_started", 0, {"version": "0", "data": {"policy": policy, "sources": configured}}, "config")
    journal.append("mixture", 0, {"weights": dict.fromkeys(sources, 1.0)}, "policy:static")
    sink = JsonlSink.open(folder / "metrics.jsonl")
    sink.write({"step": 0, "val_loss": dict.fromkeys(sources, 6.2), "val_bits_per_byte": dict.fromkeys(sources, 3.8)})
    for step in range(steps):
        loss = 6.0 - 4.0 * step / steps
        record = {
            "step": step, "tokens": 1000 * (step + 1), "loss": loss, "grad_norm": 1.0, "lr": 1e-3,
            "tokens_per_s": 5000.0, "step_s": 0.2, "data_wait_s": 0.01, "passes_s": 0.15, "update_s": 0.03,
            "model_flops_per_s": 4e14, "mfu": 0.4, "mfu_causal": 0.35, "peak_memory_bytes": 1 << 30,
            "source_loss": {name: loss + 0.1 * i for i, name in enumerate(sources)},
            "source_tokens": {name: 1000 // len(sources) for name in sources},
        }  # fmt: skip
        sink.write(record | more)
    sink.write(
        {"step": steps, "val_loss": dict.fromkeys(sources, 2.1), "val_bits_per_byte": dict.fromkeys(sources, 1.3)}
    )
    sink.write({"step": steps // 2, "eval": {"winogrande/acc": 0.5, "lambada_openai/acc": 0.2}})
    sink.write({"step": steps, "eval": {"winogrande/acc": 0.52, "lambada_openai/acc": 0.31}})
    sink.close()
    journal.append("run_finished", steps, {"tokens": 1000 * steps}, "system")
    journal.close()
    return folder
