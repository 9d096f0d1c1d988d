"""The package in examples/custom_policy, installed as a user would, is found by its name and keeps to the contract."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data_scheduler import DataConfig

ROOT = Path(__file__).parents[2]
USE = """
import json, sys
from data_scheduler import DataConfig, Feedback, Scheduler, batch_sha256

config = DataConfig.model_validate(json.loads(sys.stdin.read()))

def go(scheduler, first, last):
    hashes = []
    for step in range(first, last):
        hashes.append(batch_sha256(next(scheduler).digests))
        losses = {name: 3 - (step + 1) * 0.03 * place for place, name in enumerate("abcd")}
        scheduler.feedback(step, losses, dict.fromkeys("abcd", 10))
    return hashes

whole, first, second = (Scheduler(config) for _ in range(3))
expected = go(whole, 0, 20)
begun = go(first, 0, 9)
second.load_state_dict(json.loads(json.dumps(first.state_dict(), default=lambda array: array.tolist())))
assert begun + go(second, 9, 20) == expected
weights = whole.journal.of("mixture")[-1].data["weights"]
assert whole.journal.of("mixture")[-1].by == "policy:learning_progress"
for scheduler in (whole, first, second):
    scheduler.close()
print(json.dumps(weights))
"""


def test_the_package_is_installed_found_and_followed(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    source = shutil.copytree(ROOT / "examples" / "custom_policy", tmp_path / "source")  # building leaves files behind
    install = ["pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    installed = subprocess.run(
        [sys.executable, "-m", *install, "--target", str(tmp_path / "site"), str(source)],
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr
    sources = [source.model_dump() | {"weight": 1.0} for source in data_config().sources]
    policy = {"kind": "learning_progress", "options": {"floor": 0.05}, "horizon": 3, "guard": {"max_share": 0.6}}
    config = data_config(sources=sources, policy=policy, prefetch=1).model_dump()
    used = subprocess.run(
        [sys.executable, "-c", USE],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert used.returncode == 0, used.stderr
    weights = json.loads(used.stdout)
    # d falls fastest, a not at all.
    assert weights["a"] < weights["b"] < weights["c"] < weights["d"] <= 0.6
