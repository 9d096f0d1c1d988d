"""Text from runs and from model folders: cached equals uncached, the same seed the same text, as it comes."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from converted_runs import MODELS, Trained, train
from tokenizers import AddedToken, Tokenizer, decoders, models
from typer.testing import CliRunner

from data_scheduler.encoder import Encoder, load_encoder
from headrace.errors import ConfigError
from pretrain.cli import app
from pretrain.convert.loaded import Loaded, load
from pretrain.generate import Sampling, _Streamer, generate

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module", params=["tied GQA", "qwen3", "wonton"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("generate"), MODELS[request.param])


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Loaded:
    return load(trained.run_dir)


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_over() -> Iterator[None]:
    """Closed groups live on in cycles; collected in a later test's forked child they would hang it (see run_ranks)."""
    yield
    gc.collect()


def test_a_run_in_memory_is_the_model_that_was_trained(trained: Trained, loaded: Loaded) -> None:
    logits = loaded.model(trained.tokens[None]).logits[0]
    assert (logits - trained.logits["one document"]).abs().max() <= 1e-5


def test_cached_logits_equal_uncached_ones(trained: Trained, loaded: Loaded) -> None:
    whole = loaded.model(trained.tokens[None]).logits[0]
    cache = None
    for at in range(len(trained.tokens)):
        out = loaded.model(trained.tokens[None, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert (out.logits[0, 0] - whole[at]).abs().max() <= 1e-5
    for sampling in (GREEDY, Sampling(seed=3)):
        assert generate(loaded, "def f(", 20, sampling) == generate(loaded, "def f(", 20, sampling, cache=False)


def test_greedy_takes_the_likeliest_token(loaded: Loaded) -> None:
    ids = loaded.prompt("x = ")[0].tolist()
    for _ in range(8):
        ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = loaded.encoder.decode([token for token in ids[-8:] if token != loaded.encoder.eos_id])
    assert expected.startswith(generate(loaded, "x = ", 8, GREEDY))  # which may have ended at the document's end
    assert generate(loaded, "x = ", 8, Sampling(top_k=1, seed=5)) == generate(loaded, "x = ", 8, GREEDY)
    assert generate(loaded, "x = ", 8, Sampling(top_p=1e-6)) == generate(loaded, "x = ", 8, GREEDY)


def test_the_seed_decides_and_the_text_streams(loaded: Loaded) -> None:
    parts: list[str] = []
    text = generate(loaded, "def ", 24, Sampling(temperature=2.0, seed=1), parts.append)
    assert "".join(parts) == text
    assert len(parts) > 5
    state = torch.get_rng_state()
    assert generate(loaded, "def ", 24, Sampling(temperature=2.0, seed=1)) == text
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(loaded, "def ", 24, Sampling(temperature=2.0, seed=2)) != text


def test_a_model_folder_writes_what_its_run_writes(trained: Trained, loaded: Loaded) -> None:
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=4)
    expected = generate(loaded, "import ", 20, sampling)
    assert generate(load(trained.hf), "import ", 20, sampling) == expected
    options = ["--temperature", "1.5", "--top-k", "20", "--top-p", "0.9", "--seed", "4", "--max-tokens", "20"]
    shown = CliRunner().invoke(app, ["generate", str(trained.hf), "--prompt", "import ", *options])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == f"import {expected}\n"


def test_an_exported_model_loads_in_a_pipeline(trained: Trained, loaded: Loaded) -> None:
    from transformers import pipeline

    write = pipeline("text-generation", model=str(trained.hf), trust_remote_code=True)
    (out,) = write("def f(", max_new_tokens=8, do_sample=False)
    assert out["generated_text"].startswith("def f(" + generate(loaded, "def f(", 8, GREEDY))


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": 2**64}):
        with pytest.raises(ConfigError, match="must be"):
            Sampling(**wrong)  # type: ignore[arg-type]
    Sampling(seed=2**64 - 1)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_folder_cannot_name_a_kernel_to_fetch(key: str, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.hf, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "kernels-community/flash-attn"}))
    assert load(tmp_path / "hf").model.config._attn_implementation == "sdpa"


@pytest.fixture
def byte_encoder(tmp_path: Path) -> Encoder:
    """Token 2 + b is byte b, as in Llama's vocabulary what has no token of its own; 258 is the letter a."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)} | {"a": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_encoder(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a€a🙂é a".encode(), ["a", "€", "a", "🙂", "é", " ", "a"]),
        ("aé€".encode()[:-1] + b"a", ["a", "é", "\ufffd\ufffd\ufffd\ufffda"]),  # broken, and the decoder takes é back
        ("a€".encode()[:-1], ["a", "\ufffd\ufffd"]),
    ],
)
def test_characters_of_several_tokens_are_written_when_whole(
    text: bytes, expected: list[str], byte_encoder: Encoder
) -> None:
    parts: list[str] = []
    streamer = _Streamer(byte_encoder, parts.append)
    streamer.put(torch.tensor([[258, 258]]))
    ids = [258 if byte == ord("a") else 2 + byte for byte in text]
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert parts == expected
    assert streamer.text == byte_encoder.decode(ids)
