"""The table "What converts to what" of docs/convert.md, row by row: each command does it, and no bit is lost."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converted_runs import native_weights, save_tokenizer
from test_convert_nyonic import random_tensors
from typer.testing import CliRunner

from headrace.errors import CheckpointError
from pretrain.checkpoint import Checkpoints
from pretrain.cli.convert import app
from pretrain.config import ModelConfig
from pretrain.convert.from_hf import from_hf
from pretrain.convert.megatron import from_megatron, to_megatron
from pretrain.convert.new_run import new_run
from pretrain.convert.stored_model import find_model
from pretrain.convert.tensors import Native, native_tensors
from pretrain.convert.to_hf import to_hf

DOCS = Path(__file__).parents[2] / "docs" / "convert.md"
ROW = re.compile(r"\| (.+) \| (.+) \| `headrace convert (.+)` \| (.+) \|")
CELLS = [
    (source, target, command, family)
    for source, target, command, families in ROW.findall(DOCS.read_text("utf-8"))
    for family in families.split(", ")
]
MAKE: dict[str, Callable[[Path, Path], object]] = {
    "run": lambda run, path: shutil.copytree(run, path),
    "checkpoints of a run": lambda run, path: shutil.copytree(run, path),
    "Hugging Face folder": lambda run, path: to_hf(run, None, path),
    "Megatron-LM, torch_dist": lambda run, path: to_megatron(run, None, path),
    "Nyonic's wonton `.pt`": lambda run, path: torch.save({"module": random_tensors(True)}, path),
}
BACK: dict[str, Callable[[Path, Path], object]] = {
    "run": lambda path, run: path.rename(run),
    "Hugging Face folder": from_hf,
    "Megatron-LM, torch_dist": from_megatron,
}


def run_of(family: str, dtype: torch.dtype, root: Path) -> Path:
    """A run with three checkpoints of the same random weights."""
    model = ModelConfig(
        family=family,  # type: ignore[arg-type]
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        vocab_size=128,
        activation="gelu_tanh" if family == "wonton" else None,
    )
    generator, tokenizer = torch.Generator().manual_seed(0), save_tokenizer(root / "tokenizer")
    natives = list(native_tensors(model, 128))
    new_run(root / "run", model, natives, dtype, lambda n: _random(n.shape, generator, dtype), 64, tokenizer)
    checkpoints = Checkpoints(root / "run")
    for step in (1, 2):
        shutil.copytree(checkpoints.path(0), checkpoints.path(step))
    return root / "run"


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def test_every_conversion_stands_in_the_table() -> None:
    commands = {command.name for command in app.registered_commands} - {"verify", "inspect"}
    assert {command.split()[0] for _, _, command, _ in CELLS} == commands


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("source", "target", "command", "family"), CELLS, ids=[f"{cell[2].split()[0]} {cell[3]}" for cell in CELLS]
)
def test_the_command_does_what_the_table_says(
    source: str, target: str, command: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    run = run_of(family, dtype, tmp_path)
    MAKE[source](run, tmp_path / "source")
    name, _, _, _ = command.split()
    done = CliRunner().invoke(app, [name, str(tmp_path / "source"), "--out", str(tmp_path / "target")])
    assert done.exit_code == 0, done.output
    BACK[target](tmp_path / "target", tmp_path / "back")
    again = native_weights(Checkpoints(tmp_path / "back").path(0))
    if name == "from-nyonic":  # which is of another model; test_convert_nyonic.py has its logits
        assert len(again) == len(list(native_tensors(find_model(tmp_path / "back", 0).model, 96)))
        return
    original = native_weights(Checkpoints(run).path(0))
    assert original.keys() == again.keys()
    for key, tensor in original.items():
        assert again[key].dtype == tensor.dtype == dtype
        if name == "average":  # a third three times is not the whole to the last bit
            torch.testing.assert_close(again[key], tensor)
        else:
            assert torch.equal(again[key], tensor), key


def test_a_conversion_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    run = run_of("llama", torch.float32, tmp_path)
    model = find_model(run, 0)
    natives = list(native_tensors(model.model, model.vocab_size))
    shutil.rmtree(run)
    last = natives[-1].key  # found when the others are written already

    def make(native: Native) -> torch.Tensor:
        return torch.full(native.shape, float("nan") if native.key == last else 0.0)

    new_run(run, model.model, natives, torch.float32, make, 64, None)
    shutil.copytree(Checkpoints(run).path(0), Checkpoints(run).path(1))
    for name, *options in (("to-megatron",), ("average", "--last", "2")):
        done = CliRunner().invoke(app, [name, str(run), "--out", str(tmp_path / name), *options])
        assert isinstance(done.exception, CheckpointError)
        assert "NaN or infinite" in str(done.exception)
        assert not list(tmp_path.glob(f"{name}/*"))
