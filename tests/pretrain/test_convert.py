"""Conversion to Hugging Face and back: equal logits, equal bits, whatever layout wrote the checkpoint."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_runs import (
    DOCUMENTS,
    MODELS,
    TEXT,
    Trained,
    assert_same_tensors,
    hf_tensors,
    native_weights,
    run_config,
    save,
    save_tokenizer,
    their_logits,
    train,
)
from process_group import run_ranks
from tiny_run import SEQ_LEN, VOCAB, tiny_batch, tiny_state
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from data_scheduler.encoder import load_encoder
from headrace.errors import CheckpointError, ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Progress
from pretrain.cli.convert import app
from pretrain.config import validate_config
from pretrain.convert import to_hf as to_hf_module
from pretrain.convert.from_hf import from_hf
from pretrain.convert.to_hf import to_hf
from pretrain.step import train_step


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
    state = tiny_state(run_config({"family": "llama", "mup": True}, big), Layout(1))
    save(tmp_path / "mup", state, 1)
    with pytest.raises(ConfigError, match=r"model\.mup: the Hugging Face format has no place"):
        to_hf(tmp_path / "mup", 1, out)
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
