"""Do two checkpoints compute the same? Logits on the same text, each by the program that will use it.

A run's checkpoint goes through the model that trains (megatron-core's, `pretrain.models.gpt`), a Hugging Face folder
through transformers: what agrees here agrees with two implementations. Both compute in float32, whatever the weights'
type, so that nothing but rounding may differ.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from data_scheduler.encoder import Encoder
from headrace.errors import ConfigError
from parallel import process_groups
from parallel.attention import pack_documents
from parallel.layout import Layout
from pretrain.convert.architecture import hf_family
from pretrain.convert.loaded import is_hf_folder, load
from pretrain.convert.native import NativeReader
from pretrain.convert.stored_model import StoredModel, find_model
from pretrain.convert.tensors import native_tensors
from pretrain.convert.tokenizer_files import load_tokenizer
from pretrain.models.gpt import build_model
from pretrain.models.sizes import head_size
from pretrain.rope import rope_scaling

TEXT = "def mean(values):\n    return sum(values) / len(values)\n\nA headrace leads the water to the wheel."
MOVED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""megatron-core calls the norms in a checkpoint after the matrices that follow them, and by themselves in the model."""


class Comparison(NamedTuple):
    """Logits of two models on the same tokens."""

    difference: float
    """The largest between two logits."""
    largest: float
    """The largest logit, as a scale."""
    tokens: int
    same_choice: int
    """Tokens after which both say the same next one."""


def verify(
    one: Path,
    other: Path,
    text: str = TEXT,
    steps: tuple[int | None, int | None] = (None, None),
    tokenizer: Path | None = None,
) -> Comparison:
    """Compare two models, each a run or a Hugging Face folder. Raises CheckpointError or ConfigError."""
    first, encoder = _logits(one, text, steps[0], tokenizer, None)
    second, _ = _logits(other, text, steps[1], tokenizer, (one, encoder, text))
    if first.shape != second.shape:
        raise ConfigError(f"{one} has a vocabulary of {first.size(1)}, {other} of {second.size(1)}; pad them alike")
    same = int((first.argmax(-1) == second.argmax(-1)).sum())
    return Comparison(float((first - second).abs().max()), float(first.abs().max()), first.size(0), same)


Expected = tuple[Path, Encoder, str]


def _logits(
    path: Path, text: str, step: int | None, tokenizer: Path | None, expected: Expected | None
) -> tuple[torch.Tensor, Encoder]:
    """float32[tokens, vocabulary] of `text`."""
    if is_hf_folder(path):
        loaded = load(path, step, tokenizer, torch.float32)
        tokens = _tokens(path, text, loaded.encoder, expected)
        return loaded.model(tokens[None]).logits[0].float(), loaded.encoder
    stored = find_model(path, step)
    hf_family(stored.model)
    encoder = load_tokenizer(stored.tokenizer(tokenizer), stored.vocab_size)
    return trainer_logits(stored, _tokens(path, text, encoder, expected)), encoder


def _tokens(path: Path, text: str, encoder: Encoder, expected: Expected | None) -> torch.Tensor:
    ids = [int(token) for token in encoder.encode(text)]
    if not ids:
        raise ConfigError("--text: there is nothing in it to compare on")
    if expected is not None:
        other = [int(token) for token in expected[1].encode(text)]
        if ids != other:
            at = next((n for n, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), len(ids))
            raise ConfigError(
                f"the tokenizers of {expected[0]} and {path} differ on this text, from token {at} on; "
                "name one that fits both with --tokenizer"
            )
    return torch.tensor(ids)


@torch.no_grad()
def trainer_logits(stored: StoredModel, tokens: torch.Tensor) -> torch.Tensor:
    """float32[tokens, vocabulary] of the model that trains, `tokens` int64[n] being one document."""
    model = stored.model.model_copy(update={"mtp": None})
    process_groups.initialize(Layout(1), seed=0)
    try:
        chunk = build_model(model, Layout(1), len(tokens), stored.vocab_size)[0].eval()
        natives = list(native_tensors(model, stored.vocab_size))
        reader = NativeReader(stored.checkpoint, natives)
        parameters = dict(chunk.named_parameters())
        for native in natives:
            name = native.key
            for there, here in MOVED.items():
                name = name.replace(there, here)
            if native.layer is not None:
                name = name.replace("decoder.layers.", f"decoder.layers.{native.layer}.", 1)
            parameters.pop(name).copy_(reader.read(native))
        assert not parameters, sorted(parameters)
        positions = torch.arange(len(tokens))
        device = next(chunk.parameters()).device
        documents = pack_documents(
            torch.tensor([0, len(tokens)], dtype=torch.int32),
            positions.to(device),
            len(tokens),
            head_size(model),
            model.rope_base,
            torch.float32,
            rope_scaling=rope_scaling(model.rope_scaling),
        )
        ids = tokens[None].to(device)
        logits: torch.Tensor = chunk(ids, positions[None].to(device), None, packed_seq_params=documents)[0]
        return logits.float().cpu()
    finally:
        process_groups.shutdown()
