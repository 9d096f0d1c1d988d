"""Conversion to Hugging Face and back: equal logits, equal bits, whatever layout wrote the checkpoint."""

import gc
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_group import run_ranks
from safetensors.torch import load_file
from tiny_run import SEQ_LEN, VOCAB, tiny_batch, tiny_config, tiny_state
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from data_scheduler.encoder import load_encoder
from data_scheduler.state import State
from headrace.errors import CheckpointError, ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Progress
from pretrain.cli.convert import app
from pretrain.config import RunConfig, validate_config
from pretrain.convert import to_hf as to_hf_module
from pretrain.convert.from_hf import from_hf
from pretrain.convert.native import NativeReader
from pretrain.convert.tensors import native_tensors
from pretrain.convert.to_hf import to_hf
from pretrain.microbatch import split_batch
from pretrain.step import TrainState, place, train_step

MODELS: dict[str, dict[str, Any]] = {
    "tied GQA": {"family": "llama", "tie_embeddings": True, "rope_base": 500.0},
    "untied MHA": {"family": "llama", "num_query_groups": None, "norm_eps": 1e-6},
    "one group": {"family": "llama", "num_query_groups": 1},
    "qwen3": {"family": "qwen3", "tie_embeddings": True},
    "heads wider than hidden": {"family": "qwen3", "head_size": 32},
    "llama with QK norm": {"family": "llama", "qk_norm": True},
    "bf16": {"family": "llama", "precision": "bf16"},
    "yarn": {
        "family": "llama",
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 8, "beta_fast": 4.0},
    },
    "ntk": {"family": "llama", "rope_scaling": {"kind": "ntk", "factor": 4.0}},
}
TEXT = "def convert(x): return (x + 1) * 2  # <|endoftext|> in the text is text"
DOCUMENTS = {"one document": [0], "two documents": [0, 13]}


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of the printable ASCII characters, 97 tokens of the model's 128."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {"<unk>": 0, "<|endoftext|>": 1} | {chr(code): code - 30 for code in range(32, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run_config(changes: dict[str, Any], tokenizer: Path) -> RunConfig:
    raw = tiny_config(**changes).model_dump()
    raw["data"]["tokenizer"] = str(tokenizer)
    return validate_config(raw, "test")


def save(run_dir: Path, state: TrainState, step: int) -> Path:
    data_state = State.fresh(8, ["code", "prose"]).to_dict(0, 1)
    return Checkpoints(run_dir).save(state, data_state, Progress(step, 0))


def our_logits(state: TrainState, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """float[SEQ_LEN, VOCAB] of the row `tokens`, whose documents begin at `starts`."""
    row = np.append(tokens.numpy(), 0)[None]
    (microbatch,) = split_batch(row, [np.array(starts, dtype=np.int32)], np.zeros(1, dtype=np.int64), 1)
    batch, chunk = place(microbatch, state), state.chunks[0]
    chunk.eval()
    with torch.no_grad():
        logits: torch.Tensor = chunk(batch.input_ids, batch.position_ids, None, packed_seq_params=batch.documents)[0]
    return logits.float()


def their_logits(folder: Path, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """The same by transformers, each document by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = [*starts[1:], len(tokens)]
    with torch.no_grad():
        parts = [model(tokens[None, a:b]).logits[0] for a, b in zip(starts, ends, strict=True)]
    return torch.cat(parts).float()


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def native_weights(path: Path) -> dict[tuple[str, int | None], torch.Tensor]:
    meta = checkpoint.read_meta(path)
    model = tiny_config().model.model_validate(meta["config"]["model"])
    natives = list(native_tensors(model, meta["model"]["vocab_size"]))
    reader = NativeReader(path, natives)
    return {(native.key, native.layer): reader.read(native) for native in natives}


@dataclass
class Trained:
    """A run of two steps, converted, and what its model said of one row of tokens."""

    config: RunConfig
    run_dir: Path
    hf: Path
    tokens: torch.Tensor
    logits: dict[str, torch.Tensor]
    state_dict: dict[str, torch.Tensor]


def train(root: Path, changes: dict[str, Any]) -> Trained:
    config = run_config(changes, save_tokenizer(root / "tokenizer"))
    state = tiny_state(config, Layout(1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms begin at one and move little; every weight must differ from every other
        for parameter in state.chunks[0].parameters():
            parameter += (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    state.optimizer.reload_model_params()
    for step in range(2):
        train_step(state, tiny_batch(step), 1e-2)
    save(root / "run", state, 2)
    tokens = torch.randint(0, VOCAB, (SEQ_LEN,), generator=torch.Generator().manual_seed(0))
    logits = {name: our_logits(state, tokens, starts) for name, starts in DOCUMENTS.items()}
    weights = {name: p.detach().clone() for name, p in state.chunks[0].named_parameters()}
    process_groups.shutdown()
    out = to_hf(root / "run", None, root / "hf")
    return Trained(config, root / "run", out, tokens, logits, weights)


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("trained"), MODELS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("llama"), MODELS["tied GQA"])


@pytest.fixture
def in_one_process() -> Iterator[None]:
    """For tests that open process groups here: closes them, also when the test fails."""
    yield
    process_groups.shutdown()


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_over() -> Iterator[None]:
    """Closed groups live on in cycles; collected in a later test's forked child they would hang it (see run_ranks)."""
    yield
    gc.collect()


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_transformers_computes_the_same_logits(trained: Trained, documents: str) -> None:
    theirs = their_logits(trained.hf, trained.tokens, DOCUMENTS[documents])
    ours = trained.logits[documents]
    assert ours.abs().max() > 0.5  # a model that says nothing would agree with any other
    bf16 = trained.config.train.precision == "bf16"
    assert (theirs - ours).abs().max() <= (0.1 if bf16 else 1e-5)


def test_the_way_back_gives_the_same_bits(trained: Trained, tmp_path: Path) -> None:
    from_hf(trained.hf, tmp_path / "back")
    original = native_weights(Checkpoints(trained.run_dir).path(2))
    again = native_weights(Checkpoints(tmp_path / "back").path(0))
    assert original.keys() == again.keys()
    for name, tensor in original.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name]), name
    to_hf(tmp_path / "back", 0, tmp_path / "hf")
    assert {path.name: path.read_bytes() for path in trained.hf.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()
    }


def test_training_starts_from_the_converted_weights(trained: Trained, tmp_path: Path, in_one_process: None) -> None:
    model = from_hf(trained.hf, tmp_path / "back")
    config = trained.config.model_copy(update={"model": model})
    state = tiny_state(config, Layout(1))
    progress, data_state = checkpoint.load(Checkpoints(tmp_path / "back").path(0), state)
    assert progress == Progress(0, 0)
    assert data_state is None
    for name, parameter in state.chunks[0].named_parameters():
        assert torch.equal(parameter, trained.state_dict[name]), name
    # The optimizer must have taken them up: a step so small that it changes nothing may not bring old masters back.
    result = train_step(state, tiny_batch(0), 1e-30)
    assert not result.skipped
    for name, parameter in state.chunks[0].named_parameters():
        assert torch.equal(parameter, trained.state_dict[name]), name


TP2 = Layout(2, tensor_parallel_size=2, sequence_parallel=True)
TP2_PP2 = Layout(4, tensor_parallel_size=2, pipeline_parallel_size=2)
PP2_DP2 = Layout(4, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2, distributed_optimizer=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("layout", "tied"),
    [(TP2, True), (TP2_PP2, False), (PP2_DP2, True)],
    ids=["tp2 tied", "tp2 pp2 untied", "pp2 interleaved dp2 tied"],
)
def test_any_layout_loads_them_and_what_it_saves_converts_to_the_same_tensors(
    llama: Trained, tmp_path: Path, layout: Layout, tied: bool, request: pytest.FixtureRequest
) -> None:
    source = llama if tied else request.getfixturevalue("untied")
    model = from_hf(source.hf, tmp_path / "back")
    config = source.config.model_copy(update={"model": model})

    def load_and_save() -> None:
        state = tiny_state(config, layout)
        checkpoint.load(Checkpoints(tmp_path / "back").path(0), state)
        save(tmp_path / "spread", state, 7)

    run_ranks(layout.world_size, load_and_save)
    to_hf(tmp_path / "spread", 7, tmp_path / "hf")
    assert_same_tensors(hf_tensors(source.hf), hf_tensors(tmp_path / "hf"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("untied"), MODELS["untied MHA"])


@pytest.mark.parametrize(("there", "here"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_weights_may_be_trained_in_another_precision(
    llama: Trained, tmp_path: Path, in_one_process: None, there: str, here: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.hf, dtype=torch.bfloat16 if there == "bf16" else torch.float32)
    model.save_pretrained(tmp_path / "hf")
    config = from_hf(tmp_path / "hf", tmp_path / "run")
    raw = llama.config.model_dump() | {"model": config.model_dump()}
    raw["train"]["precision"] = here
    state = tiny_state(validate_config(raw, "test"), Layout(1))
    checkpoint.load(Checkpoints(tmp_path / "run").path(0), state)
    for name, parameter in state.chunks[0].named_parameters():
        assert parameter.dtype == (torch.bfloat16 if here == "bf16" else torch.float32)
        assert torch.equal(parameter.bfloat16(), llama.state_dict[name].bfloat16())


def test_the_folder_has_what_others_look_for(llama: Trained) -> None:
    assert {path.name for path in llama.hf.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({path.stat().st_mode for path in llama.hf.iterdir()}) == 1
    config = json.loads((llama.hf / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    expected = {
        "vocab_size": VOCAB,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": SEQ_LEN,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    assert config | expected == config
    assert "lm_head.weight" not in hf_tensors(llama.hf)
    model = AutoModelForCausalLM.from_pretrained(llama.hf)
    assert model.generation_config.eos_token_id == 1
    assert model.generation_config.bos_token_id is None


def test_its_tokenizer_gives_the_ids_of_training(llama: Trained) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama.hf)
    encoder = load_encoder(llama.config.data.tokenizer, fast=False)
    text = TEXT.replace("<|endoftext|>", "end")
    ids, _ = encoder.encode_batch([text])
    assert tokenizer(text)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.eos_token_id == encoder.eos_id


def test_big_models_are_written_in_several_files(llama: Trained, tmp_path: Path) -> None:
    limit = 100_000
    to_hf(llama.run_dir, 2, tmp_path / "hf", shard_bytes=limit)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = hf_tensors(tmp_path / "hf")
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    assert len(files) == -(-sum(tensor.nbytes for tensor in tensors.values()) // limit)
    assert all(file.stat().st_size < limit + 5000 for file in files)
    assert_same_tensors(hf_tensors(llama.hf), tensors)
    theirs = their_logits(tmp_path / "hf", llama.tokens, [0])
    assert torch.equal(theirs, their_logits(llama.hf, llama.tokens, [0]))
    from_hf(tmp_path / "hf", tmp_path / "run")
    to_hf(tmp_path / "run", 0, tmp_path / "again")
    assert_same_tensors(hf_tensors(llama.hf), hf_tensors(tmp_path / "again"))


def test_a_model_is_replaced_only_when_asked(llama: Trained, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ConfigError, match="is not a model folder"):
            to_hf(llama.run_dir, 2, out, force=force)
    (out / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--force"):
        to_hf(llama.run_dir, 2, out)
    to_hf(llama.run_dir, 2, out, force=True)
    assert {path.name for path in out.iterdir()} == {path.name for path in llama.hf.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_conversion_cut_short_leaves_what_was_there(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hf"
    to_hf(llama.run_dir, 2, out)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_hf_module.SafetensorsWriter, "close", full)
    with pytest.raises(OSError, match="No space"):
        to_hf(llama.run_dir, 2, out, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
    assert_same_tensors(hf_tensors(out), hf_tensors(llama.hf))


def test_what_cannot_be_converted_is_said(llama: Trained, tmp_path: Path, in_one_process: None) -> None:
    out = tmp_path / "hf"
    with pytest.raises(CheckpointError, match="no such run folder"):
        to_hf(tmp_path / "nothing", None, out)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 2"):
        to_hf(llama.run_dir, 3, out)
    with pytest.raises(ConfigError, match="no such file or folder"):
        to_hf(llama.run_dir, 2, out, tokenizer=tmp_path / "nothing")
    big = save_tokenizer(tmp_path / "big")
    tokenizer = Tokenizer.from_file(str(big / "tokenizer.json"))
    tokenizer.add_tokens([f"<{n}>" for n in range(40)])
    tokenizer.save(str(big / "tokenizer.json"))
    with pytest.raises(ConfigError, match="has 137 tokens, the model only 128"):
        to_hf(llama.run_dir, 2, out, tokenizer=big)
    moved = tmp_path / "moved"
    shutil.copytree(llama.run_dir, moved)
    path = Checkpoints(moved).path(2) / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"config": meta["config"] | {"data": {"tokenizer": "gone", "seq_len": 32}}}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer of the run, gone, is not there; name it with --tokenizer"):
        to_hf(moved, 2, out)
    path.write_text(json.dumps({"config": {}}))
    with pytest.raises(CheckpointError, match=r"meta\.json: not of this version of Headrace"):
        to_hf(moved, 2, out)
    state = tiny_state(run_config({"family": "wonton"}, big), Layout(1))
    save(tmp_path / "wonton", state, 1)
    with pytest.raises(ConfigError, match="family wonton: cannot be converted"):
        to_hf(tmp_path / "wonton", 1, out)
    assert not out.exists()


def test_a_damaged_checkpoint_is_said(llama: Trained, tmp_path: Path) -> None:
    for damage, message in (
        (lambda path: (path / ".metadata").write_bytes(b"x"), "not a readable checkpoint"),
        (lambda path: [file.unlink() for file in path.glob("*.distcp")], "cannot be read"),
        (lambda path: [file.write_bytes(file.read_bytes()[:4000]) for file in path.glob("*.distcp")], "cannot be read"),
    ):
        run = tmp_path / "run"
        shutil.copytree(llama.run_dir, run)
        damage(Checkpoints(run).path(2))
        with pytest.raises(CheckpointError, match=message):
            to_hf(run, 2, tmp_path / "hf")
        shutil.rmtree(run)
    assert not list(tmp_path.iterdir())


def test_commands(llama: Trained, tmp_path: Path) -> None:
    runner = CliRunner()
    out, run = tmp_path / "hf", tmp_path / "run"
    shown = runner.invoke(app, ["to-hf", str(llama.run_dir), "--step", "2", "--out", str(out)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert_same_tensors(hf_tensors(out), hf_tensors(llama.hf))
    shown = runner.invoke(app, ["from-hf", str(out), "--out", str(run)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert shown.stdout.startswith("model:\n  family: llama\n")
    assert f"headrace train CONFIG run.dir={run}" in shown.stderr
    assert f"data.tokenizer={out}" in shown.stderr
