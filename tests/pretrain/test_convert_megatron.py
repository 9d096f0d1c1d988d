"""Checkpoints of Megatron-LM and back: the same tensors, loaded by megatron-core itself, and hostile files."""

import contextlib
import gc
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_runs import MODELS, Trained, native_weights, train
from tiny_run import tiny_state

from headrace.errors import CheckpointError, ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, model_identity
from pretrain.config import ModelConfig
from pretrain.convert.megatron import LATEST, args_of, from_megatron, model_of, read_args, to_megatron
from pretrain.convert.rope import LLAMA3_DEFAULTS


@pytest.fixture(scope="module", params=["tied GQA", "wonton"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("megatron"), MODELS[request.param])


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_over() -> Iterator[None]:
    """Closed groups live on in cycles; collected in a later test's forked child they would hang it (see run_ranks)."""
    yield
    gc.collect()


@pytest.fixture
def in_one_process() -> Iterator[None]:
    """Closes the process groups that the test opens here, also when it fails."""
    yield
    process_groups.shutdown()


def test_there_and_back_the_bits_are_the_same(trained: Trained, tmp_path: Path) -> None:
    folder = to_megatron(trained.run_dir, None, tmp_path / "megatron")
    assert folder.name == "iter_0000002"
    assert (tmp_path / "megatron" / LATEST).read_text() == "2\n"
    model = from_megatron(tmp_path / "megatron", tmp_path / "back")
    original = native_weights(Checkpoints(trained.run_dir).path(2))
    again = native_weights(Checkpoints(tmp_path / "back").path(0))
    assert original.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in original.items())
    assert model.model_dump(exclude={"activation", "qk_norm", "head_size", "vocab_size"}) == (
        trained.config.model.model_dump(exclude={"activation", "qk_norm", "head_size", "vocab_size"})
    )


def test_megatron_core_loads_what_is_written(trained: Trained, tmp_path: Path, in_one_process: None) -> None:
    folder = to_megatron(trained.run_dir, None, tmp_path / "megatron")
    state = tiny_state(trained.config, Layout(1))
    with torch.serialization.safe_globals([Namespace]):  # which Megatron-LM allows for the arguments
        checkpoint.load_weights(folder, state)  # dist_checkpointing.load into megatron-core's own GPTModel
    for name, parameter in state.chunks[0].named_parameters():
        assert torch.equal(parameter, trained.state_dict[name]), name


class AttnBackend:
    """An enum of Megatron-LM, as its arguments mention one: a class that the reader does not have."""

    def __reduce__(self) -> tuple[Any, ...]:
        return AttnBackend, (), {"value": 5}


def test_what_megatron_core_saved_is_read(trained: Trained, tmp_path: Path) -> None:
    # The run's own checkpoint was saved by megatron-core, optimizer and all; Megatron-LM adds its arguments.
    folder = tmp_path / "megatron" / "iter_0000500"
    shutil.copytree(Checkpoints(trained.run_dir).path(2), folder)
    (tmp_path / "megatron" / LATEST).write_text("500")
    args = args_of(trained.config.model, 128, 32)
    common = torch.load(folder / "common.pt", weights_only=False)
    torch.save(
        {**common, "args": Namespace(**args, backend=AttnBackend()), "iteration": 500, "checkpoint_version": 3.0},
        folder / "common.pt",
    )
    from_megatron(tmp_path / "megatron", tmp_path / "run")
    original = native_weights(Checkpoints(trained.run_dir).path(2))
    again = native_weights(Checkpoints(tmp_path / "run").path(0))
    assert all(torch.equal(tensor, again[name]) for name, tensor in original.items())


class Touch:
    """Runs a function when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    torch.save({"args": Namespace(num_layers=2, evil=Touch(target))}, tmp_path / "common.pt")
    with contextlib.suppress(CheckpointError):
        read_args(tmp_path)
    assert not target.exists()
    torch.load(tmp_path / "common.pt", weights_only=False)
    assert target.exists()  # the file does what a plain reader would have suffered


def test_what_is_not_a_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        from_megatron(tmp_path / "nothing", tmp_path / "run")
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / LATEST).write_text("7")
    with pytest.raises(CheckpointError, match=r"legacy format \(mp_rank_XX\), which is not read"):
        from_megatron(tmp_path, tmp_path / "run")
    (tmp_path / "iter_0000007" / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no common\.pt"):
        from_megatron(tmp_path, tmp_path / "run")


LLAMA = ModelConfig(
    family="llama", num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, vocab_size=128
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type = 'learned_absolute'"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"rotary_percent": 0.5}, r"rotary_percent = 0\.5"),
        ({"swiglu": False}, "is of no known family|is no known family"),
        ({"hidden_size": None}, "args: hidden_size"),
        (
            {"normalization": "LayerNorm", "add_bias_linear": True, "swiglu": False, "use_rope_scaling": True}
            | {"rope_scaling_factor": 0.5},
            r"args: rope_scaling\.factor: .*got 0\.5",
        ),
    ],
)
def test_models_that_a_run_cannot_have_are_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(args_of(LLAMA, 128, 32) | changes, "common.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"family": "qwen3", "head_size": 32, "num_query_groups": 2, "tie_embeddings": True, "rope_base": 5e5},
        {"family": "wonton", "activation": "gelu", "qk_norm": False, "norm_eps": 1e-6},
        {"family": "wonton", "activation": "gelu_tanh", "qk_norm": True, "init_std": 0.01},
        {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_seq_len": 8192}},
    ],
)
def test_arguments_there_and_back_are_the_same_model(changes: dict[str, Any]) -> None:
    model = ModelConfig.model_validate(LLAMA.model_dump() | {"head_size": 16, "num_query_groups": 4} | changes)
    again = model_of(args_of(model, 128, 32), "common.pt")
    assert model_identity(again, 128, "fp32") == model_identity(model, 128, "fp32")
    free = ("rope_base", "rope_scaling", "norm_eps", "init_std")
    assert [getattr(again, key) for key in free] == [getattr(model, key) for key in free]
    if model.family == "wonton":
        assert (again.activation, again.qk_norm) == (model.activation, model.qk_norm)


def test_megatron_lms_defaults_are_its_own() -> None:
    """A model with biases whose arguments say nothing of GELU has the fused kernel's tanh approximation."""
    args = args_of(LLAMA.model_copy(update={"family": "wonton"}), 128, 32)
    del args["bias_gelu_fusion"]
    assert model_of(args, "common.pt").activation == "gelu_tanh"


def test_models_that_megatron_lm_cannot_have_are_said() -> None:
    llama3 = {"kind": "llama3", "factor": 8.0, "original_seq_len": 8192}
    changes: dict[str, Any]
    for changes, message in (
        ({"activation": "gelu"}, "activation gelu"),
        ({"rope_base": 1.5}, "rope_base 1.5"),
        ({"rope_scaling": llama3 | {"low_freq_factor": 2.0}}, r"low_freq_factor 2: Megatron-LM .* takes 1$"),
        ({"rope_scaling": llama3 | {"high_freq_factor": 16.0}}, r"high_freq_factor 16: Megatron-LM .* takes 4$"),
    ):
        with pytest.raises(ConfigError, match=message):
            args_of(ModelConfig.model_validate(LLAMA.model_dump() | changes), 128, 32)
    args_of(ModelConfig.model_validate(LLAMA.model_dump() | {"rope_scaling": llama3 | LLAMA3_DEFAULTS}), 128, 32)
