"""Trained models of every kind that can be converted, and what others read of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_run import SEQ_LEN, VOCAB, tiny_batch, tiny_config, tiny_state
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForCausalLM

from data_scheduler.state import State
from parallel import process_groups
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Progress
from pretrain.config import RunConfig, validate_config
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
    "wonton": {"family": "wonton"},
    "wonton bf16": {"family": "wonton", "precision": "bf16", "tie_embeddings": True},
    "wonton without QK norm": {"family": "wonton", "qk_norm": False, "activation": "gelu_tanh", "num_query_groups": 2},
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
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
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
