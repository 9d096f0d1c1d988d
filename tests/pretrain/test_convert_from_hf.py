"""Runs that begin with the weights of a Hugging Face folder; folders that cannot be used, each with its one line."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data_scheduler import DataConfig
from headrace.errors import CheckpointError, ConfigError, HeadraceError
from parallel import process_groups
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints
from pretrain.config import ModelConfig, RunConfig, validate_config
from pretrain.convert.architecture import from_hf_config
from pretrain.convert.from_hf import from_hf
from pretrain.convert.new_run import model_section
from pretrain.convert.safetensors_folder import SafetensorsReader
from pretrain.convert.to_hf import to_hf
from pretrain.metrics import read_records
from pretrain.metrics.jsonl import append_record
from pretrain.microbatch import split_batch
from pretrain.step import build_state, place
from pretrain.train import train

SIZES = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def random_model(**changes: Any) -> Any:
    """A model of transformers with random weights, norms included."""
    torch.manual_seed(0)
    config, kind = LlamaConfig, LlamaForCausalLM
    if changes.pop("qwen3", False):
        config, kind = Qwen3Config, Qwen3ForCausalLM
        changes.setdefault("head_dim", 16)
    model = kind(config(**(SIZES | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def run_config(run_dir: Path, model: ModelConfig, data: DataConfig, **changes: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": yaml.safe_load(model_section(model))["model"],
        "data": data.model_dump(),
        "train": {"steps": 1, "micro_batch_size": 2, "eval_sequences": 2, "threads": 1},
        "metrics": {"progress": False},
    }
    for key, value in changes.items():
        section, _, rest = key.partition("__")
        raw.setdefault(section, {})[rest] = value
    return validate_config(raw, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        {"qwen3": True},
        {"qwen3": True, "head_dim": 24},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 700.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 700.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh", "qwen3": True},
    ],
    ids=["untied", "tied", "mha", "qwen3", "wide heads", "linear", "llama3", "yarn", "geglu", "tanh"],
)
def test_a_random_model_computes_the_same_here(
    changes: dict[str, Any], tmp_path: Path, data_config: Callable[..., DataConfig]
) -> None:
    theirs = random_model(**changes)
    theirs.save_pretrained(tmp_path / "hf")
    model = from_hf(tmp_path / "hf", tmp_path / "run")
    config = run_config(tmp_path / "run", model, data_config(seq_len=64, global_batch_size=8, lanes=8))
    tokens = torch.randint(0, 640, (64,), generator=torch.Generator().manual_seed(0))
    layout = Layout(1)
    ranks = process_groups.initialize(layout, seed=0)
    try:
        state = build_state(config, layout, ranks, 640)
        checkpoint.load(Checkpoints(tmp_path / "run").path(0), state)
        row = np.append(tokens.numpy(), 0)[None]
        (microbatch,) = split_batch(row, [np.zeros(1, dtype=np.int32)], np.zeros(1, dtype=np.int64), 1)
        batch = place(microbatch, state)
        with torch.no_grad():
            ours = state.chunks[0].eval()(batch.input_ids, batch.position_ids, None, packed_seq_params=batch.documents)[
                0
            ]
            expected = theirs(tokens[None]).logits[0]
    finally:
        process_groups.shutdown()
    assert expected.abs().max() > 1
    assert (ours - expected).abs().max() <= 1e-5


def test_a_run_starts_from_them_and_resumes(
    tmp_path: Path, corpus: Path, data_config: Callable[..., DataConfig]
) -> None:
    hf, run = tmp_path / "hf", tmp_path / "run"
    random_model().save_pretrained(hf)
    (hf / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    model = from_hf(hf, run)
    append_record(run / "metrics.jsonl", {"step": 0, "eval": {"piqa/acc": 0.5}})
    raw = data_config(seq_len=32, global_batch_size=8, lanes=8).model_dump() | {"tokenizer": str(hf)}
    for source in raw["sources"]:
        source["val_paths"] = source["paths"]
    data = DataConfig.model_validate(raw)
    gc.collect()  # closed process groups of earlier tests, which would hang the child that collects them
    # Steps so small that they round to nothing: what the run saves is what it began with.
    still = {"optimizer__lr": 1e-30, "optimizer__min_lr": 0.0, "checkpoint__every": 1}
    for steps in (1, 2):
        config = run_config(run, model, data, train__steps=steps, **still)
        log = tmp_path / f"{steps}.log"
        assert child_process.run(lambda config=config: train(config), log) == 0, log.read_text()
        expected = "starting" if steps == 1 else "resuming"
        assert expected in log.read_text()
    records = list(read_records(run / "metrics.jsonl"))
    assert [record["step"] for record in records if "val_loss" in record] == [0, 1, 2]
    assert [record["step"] for record in records if "loss" in record] == [0, 1]
    assert [record["eval"] for record in records if "eval" in record] == [{"piqa/acc": 0.5}]
    to_hf(run, 2, tmp_path / "again")
    before, after = load_file(hf / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("stored", "expected"), [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
def test_half_precision_weights_keep_their_values(
    stored: str, expected: torch.dtype, tmp_path: Path, corpus: Path
) -> None:
    random_model().to(getattr(torch, stored)).save_pretrained(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "run")
    to_hf(tmp_path / "run", 0, tmp_path / "again", tokenizer=corpus / "tokenizer.json")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == expected
        assert torch.equal(tensor.to(expected), after[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == expected


def test_without_a_tokenizer_one_has_to_be_named(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConfigError, match="without a tokenizer; name one with --tokenizer"):
        to_hf(tmp_path / "run", 0, tmp_path / "again")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    random_model().save_pretrained(folder, max_shard_size="150kB")
    return folder


def config_with(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def test_of_a_file_only_what_the_index_takes_from_it_is_read(saved: Path, tmp_path: Path) -> None:
    """A stale copy of a weight in another file, as an interrupted rewrite leaves it, is not the weight."""
    folder = tmp_path / "hf"
    shutil.copytree(saved, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in {*index.values()}:
        stale = {name: torch.full(torch.Size([640, 64]), 7.0) for name in index if index[name] != file}
        save_file(load_file(folder / file) | stale, folder / file)
    reader, before = SafetensorsReader(folder), SafetensorsReader(saved)
    assert len({*index.values()}) > 1
    for name in index:
        assert torch.equal(reader.read(name), before.read(name)), name


def a_file_of(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[-1]


def tensors_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for file in folder.glob("model-*.safetensors"):
            tensors |= load_file(file)
            file.unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


Q, BIAS = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"
PROBLEMS: dict[str, tuple[Callable[[Path], Any], type[HeadraceError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, r"no config\.json in it"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), CheckpointError, r"config\.json: not valid JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "not a model configuration"),
    "other model": (config_with(model_type="gpt2", architectures=["GPT2LMHeadModel"]), ConfigError, "GPT2LMHeadModel"),
    "other head": (config_with(architectures=["LlamaForSequenceClassification"]), ConfigError, "SequenceClass"),
    "no architecture": (
        config_with(model_type=None, architectures=None),
        ConfigError,
        "LlamaForCausalLM, Qwen3ForCausalLM and Wonton",
    ),
    "attention bias": (config_with(attention_bias=True), ConfigError, "attention_bias = True is not supported"),
    "MLP bias": (config_with(mlp_bias=True), ConfigError, "mlp_bias = True is not supported"),
    "activation": (config_with(hidden_act="relu"), ConfigError, "hidden_act = 'relu' is not supported"),
    "head size": (config_with(head_dim=15), ConfigError, "head_dim = 15 is not supported"),
    "quantized": (config_with(quantization_config={"bits": 4}), ConfigError, "quantization_config"),
    "no size": (config_with(hidden_size="64"), ConfigError, "hidden_size must be a whole number above 0, got '64'"),
    "no heads": (config_with(num_attention_heads=0), ConfigError, "num_attention_heads must be a whole number above 0"),
    "no length": (config_with(max_position_embeddings=None), ConfigError, "max_position_embeddings must be a whole"),
    "groups in words": (
        config_with(num_key_value_heads="4"),
        ConfigError,
        "num_key_value_heads = '4' is not supported",
    ),
    "no groups": (config_with(num_key_value_heads=0), ConfigError, "num_key_value_heads = 0 is not supported"),
    "heads of nothing": (config_with(head_dim=0), ConfigError, "head_dim = 0 is not supported"),
    "activations": (config_with(hidden_act=["silu"]), ConfigError, r"hidden_act = \['silu'\] is not supported"),
    "architecture 5": (config_with(architectures=5), ConfigError, "architectures must be a list of names, got 5"),
    "architectures 5": (config_with(architectures=[5]), ConfigError, "5 cannot be converted"),
    "gated wonton": (
        config_with(model_type="wonton", architectures=["WontonForCausalLM"], attention_bias=True, hidden_act="silu"),
        ConfigError,
        "activation silu: the wonton family has no gates",
    ),
    "rope scaling in a word": (
        config_with(rope_scaling="linear"),
        ConfigError,
        "rope_scaling must be a section with a rope_type, got 'linear'",
    ),
    "bad number": (config_with(rms_norm_eps=-1.0), ConfigError, r"norm_eps: .* got -1\.0"),
    "rope scaling": (
        config_with(rope_scaling={"rope_type": "longrope", "factor": 8.0}),
        ConfigError,
        "rope scaling 'longrope' is not supported; linear, yarn, llama3 are",
    ),
    "half a rope scaling": (
        config_with(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        ConfigError,
        "rope scaling 'llama3': kind llama3 needs original_seq_len",
    ),
    "other rope scaling": (
        config_with(rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}),
        ConfigError,
        "rope scaling 'yarn' with mscale is not supported",
    ),
    "old rope scaling": (config_with(rope_scaling={"type": "dynamic", "factor": 2}), ConfigError, "scaling 'dynamic'"),
    "partial rope": (config_with(partial_rotary_factor=0.5), ConfigError, "partial_rotary_factor"),
    "wrong shape": (
        config_with(intermediate_size=100),
        CheckpointError,
        r"gate_proj.weight has shape \(96, 64\), config.json makes it \(100, 64\)",
    ),
    "missing shard": (lambda f: a_file_of(f).unlink(), CheckpointError, "missing, though .*index.json names it"),
    "torn shard": (
        lambda f: a_file_of(f).write_bytes(a_file_of(f).read_bytes()[:-9]),
        CheckpointError,
        "not a whole safetensors file",
    ),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("*.safetensors*")],
        CheckpointError,
        r"no model\.safetensors and no model\.safetensors\.index\.json",
    ),
    "torn index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[1]"),
        CheckpointError,
        "not an index of safetensors files",
    ),
    "missing tensor": (tensors_with(lambda t: t.pop(Q)), CheckpointError, f"tensor {Q} is missing"),
    "surplus tensor": (
        tensors_with(lambda t: t.update({BIAS: torch.zeros(64)})),
        CheckpointError,
        f"tensor {BIAS} has no place in the model",
    ),
    "integers": (
        tensors_with(lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int8)})),
        CheckpointError,
        "weights of type F32, I8",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_wrong_is_said_in_one_line(problem: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change, error, message = PROBLEMS[problem]
    change(folder)
    with pytest.raises(error, match=message) as raised:
        from_hf(folder, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, corpus: Path) -> None:
    random_model(vocab_size=256).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match=r"tokenizer .*hf: has \d+ tokens, the model only 256"):
        from_hf(tmp_path / "hf", tmp_path / "run")


def test_a_run_that_is_there_is_left_alone(saved: Path, tmp_path: Path) -> None:
    from_hf(saved, tmp_path / "run")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="is there already; name a new run folder"):
        from_hf(saved, tmp_path / "run")
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_conversion_cut_short_can_be_started_again(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.convert.new_run.publish", full)
        with pytest.raises(OSError, match="No space"):
            from_hf(saved, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").latest() is None
    from_hf(saved, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").steps() == [0]


def test_configurations_of_other_versions_of_transformers() -> None:
    sizes = {key: SIZES[key] for key in list(SIZES)[:5]}
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16", **sizes}
    new = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, **sizes}
    assert from_hf_config(old, "old") == from_hf_config(new, "new")
    bare = from_hf_config({"model_type": "llama", **sizes}, "bare")
    default = LlamaConfig()
    assert bare.rope_base == default.rope_parameters["rope_theta"]
    assert bare.norm_eps == default.rms_norm_eps
    assert bare.tie_embeddings == default.tie_word_embeddings
    assert bare.num_query_groups == SIZES["num_attention_heads"]
    for theirs, ours in (("silu", None), ("swish", None), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")):
        assert from_hf_config(old | {"hidden_act": theirs}, "old").activation == ours
    qwen3 = Qwen3Config()
    filled = {"model_type": "qwen3", "vocab_size": 640, "hidden_size": 4096, "intermediate_size": 96}
    model = from_hf_config(filled | {"num_hidden_layers": 2, "num_attention_heads": 32}, "qwen3")
    assert (model.num_query_groups, 4096 // 32) == (qwen3.num_key_value_heads, qwen3.head_dim)
