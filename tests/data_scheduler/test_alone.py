"""The scheduler needs nothing of the trainer: it works where those packages cannot be imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_scheduler import DataConfig, Scheduler, batch_sha256

ROOT = Path(__file__).parents[2]
TRAINER = [
    "megatron",
    "transformers",
    "transformer_engine",
    "apex",
    "flash_attn",
    "accelerate",
    "lightning",
    "datatrove",
]
TRAINER += [
    "wandb",
    "tensorboard",
    "prometheus_client",
    "matplotlib",
    "psutil",
    "safetensors",
    "scipy",
    "sentencepiece",
]
TRAINER += ["pretrain", "parallel", "launch"]

BLOCK = """
import json, sys
blocked = set(json.loads(sys.argv[1]))
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from data_scheduler import DataConfig, batch_sha256
config = DataConfig.model_validate_json(sys.argv[2])
"""
NUMPY = """
from data_scheduler import Scheduler
print(batch_sha256(next(Scheduler(config)).digests))
assert "torch" not in sys.modules
try:
    from data_scheduler import DataScheduler
except ImportError as error:
    assert str(error).startswith("DataScheduler needs torch"), error
else:
    raise AssertionError
"""
TORCH = """
from data_scheduler import DataScheduler
scheduler = DataScheduler.from_config(config)
tokens = next(iter(scheduler))["tokens"]
scheduler.load_state_dict(scheduler.state_dict())
assert next(iter(scheduler))["tokens"].shape == tokens.shape
print(int(tokens.sum()))
"""


@pytest.mark.parametrize(("code", "blocked"), [(NUMPY, ["torch", *TRAINER]), (TORCH, TRAINER)], ids=["numpy", "torch"])
def test_works_without_the_trainers_packages(
    code: str, blocked: list[str], data_config: Callable[..., DataConfig]
) -> None:
    config = data_config(prefetch=2)
    command = [sys.executable, "-c", BLOCK + code, json.dumps(blocked), config.model_dump_json()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    batch = next(Scheduler(config))
    expected = batch_sha256(batch.digests) if code == NUMPY else str(int(batch.tokens.sum()))
    assert done.stdout.strip() == expected
