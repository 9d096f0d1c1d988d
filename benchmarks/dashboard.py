"""How the dashboard keeps up with a long run, in headless Chromium, and what its viewers cost a run.

    python benchmarks/dashboard.py                     # 10⁶ steps, 100 viewers
    python benchmarks/dashboard.py --steps 20000 --viewers 5 --seconds 3 --out small.json

Page: a synthetic run folder; from asking for the page to the drawn loss (parsing for the first time, columns kept, and
index in memory), and from letting go of a drag to the zoomed plot. Viewers: the time of a fixed piece of numpy work on
one core (a step's stand-in, so that nothing but the dashboard differs), with a dashboard that nobody looks at and with
many that listen and ask again at every new record, in turn; the ratio of the medians is what counts.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from loading.result import circumstances, result_options, versions, write_result

RESULT = Path(__file__).parent / "results" / "dashboard.json"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
SOURCES = ("web", "code", "books", "math")


def write_run(folder: Path, steps: int) -> int:
    """A run folder of so many steps; bytes of its metrics.jsonl."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    noise = np.random.default_rng(0).normal(0, 0.05, (steps, 1 + len(SOURCES)))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            file.write(record(step, steps, noise[step].tolist()))
    return (folder / "metrics.jsonl").stat().st_size


def record(step: int, steps: int, noise: list[float]) -> str:
    loss = 2.0 + 8.0 / (1.0 + 20.0 * step / steps)
    return json.dumps(
        {
            "step": step, "tokens": 4_000_000 * (step + 1), "input_tokens": 4_194_304 * (step + 1), "seq_len": 4096,
            "global_batch_size": 1024, "loss": loss + noise[0], "grad_norm": 1.0 + noise[1], "lr": 3e-4,
            "tokens_per_s": 1e6, "step_s": 4.0, "data_wait_s": 0.01, "peak_memory_bytes": 1 << 36,
            "batch_sha256": "0" * 64, "source_loss": {name: loss + noise[i + 1] for i, name in enumerate(SOURCES)},
            "source_tokens": dict.fromkeys(SOURCES, 1_000_000),
        }
    ) + "\n"  # fmt: skip


@contextmanager
def dashboard(root: Path, cache: Path) -> Iterator[str]:
    """The address of a dashboard in a process of its own, of the lowest priority, as beside a run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "dashboard", str(root), "--port", "0", "--beside", str(os.getpid())],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1].rstrip("/")
    finally:
        process.terminate()
        process.wait()


def page_times(url: str, browser: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds until the loss is drawn, and until a zoom is."""
    found: dict[str, list[float]] = {"load_s": [], "zoom_s": []}
    for _ in range(repeats):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(600_000)
        began = time.perf_counter()
        page.goto(f"{url}/#/run?run=long")
        page.locator(".plot .u-over").first.wait_for()
        page.get_by_text("Reading metrics").wait_for(state="hidden")
        found["load_s"].append(time.perf_counter() - began)
        page.locator(".plot").first.focus()
        began = time.perf_counter()
        with page.expect_response(lambda reply: "from=" in reply.url and "name=loss" in reply.url) as reply:
            page.keyboard.press("+")
        reply.value.finished()
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        found["zoom_s"].append(time.perf_counter() - began)
        page.close()
    return found


def view(host: str, over: threading.Event) -> None:
    """A viewer: listens, and asks for the loss whenever there is news."""
    listening = http.client.HTTPConnection(host, timeout=60)
    listening.request("GET", "/api/news?run=long")
    stream = listening.getresponse()
    while not over.is_set():
        if stream.readline().startswith(b"data:"):
            asking = http.client.HTTPConnection(host, timeout=60)
            asking.request("GET", "/api/series?run=long&name=loss&width=1200")
            asking.getresponse().read()
            asking.close()
    listening.close()


VIEWERS = """
import sys, threading, os
sys.path.insert(0, "benchmarks")
from dashboard import view
over = threading.Event()
os.nice(19)
for _ in range(int(sys.argv[2])):
    threading.Thread(target=view, args=(sys.argv[1], over), daemon=True).start()
sys.stdin.read()
os._exit(0)
"""


def step_times(url: str, metrics: Path, steps: int, viewers: int, seconds: float) -> list[float]:
    """Times of the stand-in's steps while so many look on; a record is appended after each."""
    command = [sys.executable, "-c", VIEWERS, urlsplit(url).netloc, str(viewers)]
    watching = subprocess.Popen(command, stdin=subprocess.PIPE) if viewers else None
    time.sleep(1.0)
    a = np.random.default_rng(0).normal(size=(700, 700))
    times, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        for _ in range(10):
            a @ a
        times.append(time.perf_counter() - began)
        steps += 1
        with metrics.open("a") as file:
            file.write(record(steps, steps, [0.0] * (1 + len(SOURCES))))
    if watching is not None:
        watching.communicate()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--viewers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=5)
    result_options(parser, RESULT)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    result = circumstances("dashboard.py") | {"versions": versions(["starlette", "uvicorn", "numpy", "playwright"])}
    result |= {"steps": options.steps, "viewers": options.viewers}
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        root, cache = Path(work, "runs"), Path(work, "cache")
        result["metrics_bytes"] = write_run(root / "long", options.steps)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        with dashboard(root, cache) as url:
            result["first_time"] = page_times(url, browser, 1)
            result["in_memory"] = page_times(url, browser, options.repeats)
        with dashboard(root, cache) as url:
            result["columns_kept"] = page_times(url, browser, 1)
            alone, watched = [], []
            for _ in range(3):
                for times, viewers in ((alone, 0), (watched, options.viewers)):
                    metrics = root / "long" / "metrics.jsonl"
                    times += step_times(url, metrics, options.steps, viewers, options.seconds / 3)
        browser.close()
    result["step_ratio"] = statistics.median(watched) / statistics.median(alone)
    result |= {"steps_alone": len(alone), "steps_watched": len(watched)}
    print(json.dumps(result, indent=2))
    write_result(options.out, result)


if __name__ == "__main__":
    main()
