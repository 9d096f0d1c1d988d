"""The examples do what they say: killed at a step and started again, they see the same batches and losses."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_scheduler import DataConfig, DataScheduler

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"step (\d+)  batch (\w{16})  loss (\S+)")
Steps = dict[int, tuple[str, str]]


def load(name: str) -> Any:
    spec = spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(printed: str) -> Steps:
    return {int(step): (batch, loss) for step, batch, loss in STEP.findall(printed)}


@pytest.fixture
def config(tmp_path: Path, data_config: Callable[..., DataConfig]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": data_config(prefetch=2).model_dump()}))
    return path


ARGUMENTS = ["--steps", "10", "--save-every", "4"]


def whole_run(example: Any, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Steps:
    example.main([*ARGUMENTS, "--config", str(config), "--out", str(tmp_path / "whole")])
    whole = parse(capsys.readouterr().out)
    assert list(whole) == list(range(10))
    return whole


def resumed_run(example: Any, config: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> Steps:
    example.main([*ARGUMENTS, "--config", str(config), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "resumed" in printed
    return parse(printed)


def test_a_killed_loop_goes_on_as_if_nothing_had_happened(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example, out = load("plain_pytorch"), tmp_path / "killed"
    whole = whole_run(example, config, tmp_path, capsys)
    command = [sys.executable, example.__file__, *ARGUMENTS, "--config", str(config), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    printed = ""
    while 6 not in parse(printed):
        line = process.stdout.readline()
        assert line, process.communicate()
        printed += line
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = parse(printed)
    resumed = resumed_run(example, config, out, capsys)
    # The process may have come to the next checkpoint between its line and the signal.
    assert list(resumed) in (list(range(4, 10)), list(range(8, 10)))
    assert killed.items() <= whole.items()
    assert resumed.items() <= whole.items()


class Interrupted(Exception):
    """Nothing that a framework knows how to treat."""


@pytest.mark.parametrize(("name", "needs"), [("hf_trainer", "accelerate"), ("lightning_module", "lightning")])
def test_an_interrupted_framework_goes_on_as_if_nothing_had_happened(
    name: str, needs: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(needs)
    example, out = load(name), tmp_path / "interrupted"
    whole = whole_run(example, config, tmp_path, capsys)

    def print_until_step_6(text: str, **options: Any) -> None:
        print(text, **options)
        if text.startswith("step 6 "):
            raise Interrupted

    example.print = print_until_step_6
    with pytest.raises(Interrupted):
        example.main([*ARGUMENTS, "--config", str(config), "--out", str(out)])
    interrupted = parse(capsys.readouterr().out)
    assert list(interrupted) == list(range(7))
    example.print = print
    resumed = resumed_run(example, config, out, capsys)
    assert list(resumed) == list(range(4, 10))
    assert interrupted.items() <= whole.items()
    assert resumed.items() <= whole.items()


def test_positions_keep_transformers_inside_documents(config: Path) -> None:
    """What `hf_trainer.py` relies on: another token in one document changes nothing in the next."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=400, **sizes)).eval()
    batch = next(iter(DataScheduler.from_config(config)))
    positions = batch["position_ids"]
    row = int((positions == 0).sum(dim=1).argmax())  # the sequence with the most documents
    second = int((positions[row] == 0).nonzero()[1])
    assert second > 0
    tokens = batch["tokens"][row : row + 1, :-1].clone()
    with torch.no_grad():
        before = model(input_ids=tokens, position_ids=positions[row : row + 1], use_cache=False).logits[0]
        tokens[0, second - 1] ^= 1
        after = model(input_ids=tokens, position_ids=positions[row : row + 1], use_cache=False).logits[0]
    assert not torch.equal(before[second - 1], after[second - 1])
    assert torch.equal(before[second:], after[second:])
