"""Nyonic's public wonton checkpoints (`models/wonton-6.7B.pt`) as step 0 of a run.

Names and shapes are those of `nyonic/model.py` and `main.py` in github.com/nyonicai/nyonic-public:

    embedding.weight                                     [vocabulary, d_embed]
    transformer_encoder.layers.0.self_attn.in_proj_weight  [3 d_embed, d_embed], q then k then v, and in_proj_bias
    ...self_attn.out_proj_weight, out_proj_bias; with qk_layer_norm also q_layer_norm.*, k_layer_norm.* [head]
    ...linear1, linear2, norm1, norm2                    weight and bias of each
    transformer_encoder.norm                             weight and bias
    linear.weight, linear.bias                           [vocabulary, d_embed], [vocabulary]: the output head

The state dict lies under `module` (2.7B, 6.7B) or `state_dict` (1.5B), names may begin with `model.`.
"""

import re
from pathlib import Path
from typing import Any

import torch

from headrace.errors import CheckpointError, ConfigError
from headrace.validation import validated
from pretrain.config import ModelConfig
from pretrain.convert.new_run import check_new, new_run
from pretrain.convert.tensors import Native, Part, check_finite, join, native_tensors
from pretrain.convert.tokenizer_files import load_tokenizer

HEAD_SIZE = 128
"""Of the public models with rotary embedding; without QK-LayerNorm no tensor tells it."""
SEQ_LEN = 2048
"""Their `context_len`."""
NAMES = {
    "model.embed_tokens": "embedding",
    "model.norm": "transformer_encoder.norm",
    "lm_head": "linear",
    "self_attn.q_norm": "self_attn.q_layer_norm",
    "self_attn.k_norm": "self_attn.k_layer_norm",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "mlp.up_proj": "linear1",
    "mlp.down_proj": "linear2",
}
"""Module of a Hugging Face wonton, without the layer, and Nyonic's."""
QKV = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
IGNORED = re.compile(r"encoder_layer\.|final_norm\.|.*rotary_embedding\.|embedding\._token_pos$")
"""What `main.py` leaves out, and buffers."""


def from_nyonic(
    file: Path,
    run: Path,
    heads: int | None = None,
    drop_output_bias: bool = False,
    tokenizer: Path | None = None,
) -> ModelConfig:
    """Make the run folder `run`, whose step 0 has the weights of `file`, and return the model.

    The head's bias has no counterpart here: it must be zero, or be dropped knowingly. Raises CheckpointError or
    ConfigError.
    """
    tensors = read_state_dict(file)
    model = model_of(tensors, file, heads)
    assert model.vocab_size is not None
    _check_output_bias(tensors.pop("linear.bias", None), file, drop_output_bias)
    natives = list(native_tensors(model, model.vocab_size))
    parts = [part for native in natives for part in native.parts]
    _check(tensors, parts, file)
    if tokenizer is not None:
        load_tokenizer(tokenizer, model.vocab_size)
    check_new(run)
    types = {tensor.dtype for tensor in tensors.values()}
    dtype = torch.bfloat16 if types == {torch.bfloat16} else torch.float32

    def read(part: Part) -> torch.Tensor:
        name, rows = source_of(part.name)
        tensor = tensors[name]
        check_finite(tensor, f"{file}: {name}")
        return tensor if rows is None else tensor.chunk(3)[rows]

    def make(native: Native) -> torch.Tensor:
        return join(native, read, dtype).clone()  # the file is mapped: what is written must be memory of our own

    found = None if tokenizer is None else tokenizer.absolute()
    new_run(run, model, natives, dtype, make, SEQ_LEN, found)
    return model


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of `file` by Nyonic's names, mapped from disk; nothing in it is run. Raises CheckpointError."""
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except Exception as error:  # a damaged pickle raises anything
        first = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{file}: not a readable .pt file of tensors: {type(error).__name__}: {first}") from None
    for key in ("module", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{file}: holds no state dict of tensors")
    named = {str(name).removeprefix("model."): tensor for name, tensor in loaded.items()}
    return {name: tensor for name, tensor in named.items() if not IGNORED.match(name)}


def model_of(tensors: dict[str, torch.Tensor], file: Path, heads: int | None) -> ModelConfig:
    """The model that tensors of these shapes belong to. Raises CheckpointError or ConfigError."""
    if "embedding.token_position_embedding.weight" in tensors:
        raise ConfigError(f"{file}: has learned position embeddings (wonton-1.5B); only rotary models can be converted")
    layers = {int(match[1]) for name in tensors if (match := re.match(r"transformer_encoder\.layers\.(\d+)\.", name))}
    embedding, inner = tensors.get("embedding.weight"), tensors.get("transformer_encoder.layers.0.linear1.weight")
    if embedding is None or inner is None or embedding.ndim != 2 or inner.ndim != 2:
        raise CheckpointError(f"{file}: is no wonton (embedding.weight or transformer_encoder.layers.0 is missing)")
    vocab_size, hidden = embedding.shape
    norm = tensors.get("transformer_encoder.layers.0.self_attn.q_layer_norm.weight")
    heads = heads or hidden // max(1, HEAD_SIZE if norm is None else norm.numel())
    if heads < 1 or hidden % heads or hidden // heads % 2:
        raise ConfigError(f"{file}: {hidden} dimensions do not make {heads} heads of even size; give --heads")
    raw = {
        "family": "wonton",
        "num_layers": len(layers),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "ffn_hidden_size": inner.shape[0],
        "vocab_size": vocab_size,
        "qk_norm": norm is not None,
    }
    return validated(ModelConfig, raw, str(file))


def source_of(name: str) -> tuple[str, int | None]:
    """(Nyonic's tensor, which third of its rows) that a tensor of a Hugging Face wonton is; None: the whole."""
    module, _, kind = name.rpartition(".")
    match = LAYER.fullmatch(module)
    if match is None:
        return f"{NAMES[module]}.{kind}", None
    layer = f"transformer_encoder.layers.{match[1]}"
    if match[2] in QKV:
        return f"{layer}.self_attn.in_proj_{kind}", QKV[match[2]]
    if match[2] == "self_attn.o_proj":
        return f"{layer}.self_attn.out_proj_{kind}", None
    return f"{layer}.{NAMES[match[2]]}.{kind}", None


def _check_output_bias(bias: torch.Tensor | None, file: Path, drop: bool) -> None:
    if bias is None or drop or not bool(bias.any()):
        return
    raise ConfigError(
        f"{file}: linear.bias, the head's, is up to {float(bias.abs().max()):.3g} and has no place in the model; "
        "--drop-output-bias leaves it out, which changes the logits by as much"
    )


def _check(tensors: dict[str, torch.Tensor], parts: list[Part], file: Path) -> None:
    needed: set[str] = set()
    for part in parts:
        name, rows = source_of(part.name)
        shape = part.shape if rows is None else (3 * part.shape[0], *part.shape[1:])
        if name not in tensors:
            raise CheckpointError(f"{file}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{file}: tensor {name} has shape {tuple(tensors[name].shape)}, it should have {shape}"
            )
        needed.add(name)
    unknown = sorted(set(tensors) - needed)
    if unknown:
        raise CheckpointError(f"{file}: tensor {unknown[0]} has no place in the model")
