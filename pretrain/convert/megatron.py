"""Checkpoints of Megatron-LM, in the torch_dist format of megatron-core, to and from runs.

    <dir>/latest_checkpointed_iteration.txt      500
    <dir>/iter_0000500/.metadata, *.distcp       the weights, under the names that our checkpoints have too
    <dir>/iter_0000500/common.pt                 {"args": Namespace(num_layers=...), "iteration": 500, ...}

Both sides are megatron-core's, so tensors keep their names and bits; what is translated is `args`, from which
Megatron-LM makes its model, and a run's configuration. The legacy format (mp_rank_00/model_optim_rng.pt) is not read.
"""

import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from headrace.errors import CheckpointError, ConfigError
from headrace.validation import validated
from pretrain.config import ModelConfig
from pretrain.convert.native import NativeReader, write_weights
from pretrain.convert.new_run import check_new, new_run
from pretrain.convert.rope import LLAMA3_DEFAULTS
from pretrain.convert.stored_model import find_model
from pretrain.convert.tensors import native_tensors
from pretrain.models.sizes import FAMILIES, activation, has_qk_norm, head_size, query_groups

LATEST = "latest_checkpointed_iteration.txt"
LLAMA3_SEQ_LEN = 8192
"""What Megatron-LM's `--use-rope-scaling` takes the model to have been trained with before."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "num_experts": (None, 0),
    "apply_layernorm_1p": (False,),
    "add_qkv_bias": (False,),
    "squared_relu": (False,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
}
"""Arguments, and the values for which a run has the same model; one that is missing has the first."""


def from_megatron(folder: Path, run: Path, tokenizer: Path | None = None) -> ModelConfig:
    """Make the run folder `run`, whose step 0 has the weights of Megatron-LM's checkpoint in `folder` (the folder it
    saved to, or one iteration of it), and return the model. Raises CheckpointError or ConfigError."""
    path = _iteration(folder)
    args = read_args(path)
    model = model_of(args, str(path / "common.pt"))
    assert model.vocab_size is not None
    natives = list(native_tensors(model, model.vocab_size))
    reader = NativeReader(path, natives)
    check_new(run)
    dtype = torch.bfloat16 if reader.dtype == torch.bfloat16 else torch.float32
    seq_len = int(args.get("seq_length") or args.get("max_position_embeddings") or 2048)
    found = None if tokenizer is None else tokenizer.absolute()
    new_run(run, model, natives, dtype, lambda native: reader.read(native).to(dtype), seq_len, found)
    return model


def to_megatron(run: Path, step: int | None, out: Path) -> Path:
    """Write the weights of a checkpoint of `run` for Megatron-LM (`--use-checkpoint-args --finetune` loads them); the
    folder of the iteration. Raises CheckpointError or ConfigError."""
    stored = find_model(run, step)
    if stored.model.mup or stored.model.num_experts is not None or stored.model.mtp is not None:
        raise ConfigError(
            f"{run}: models with mup, num_experts or mtp cannot be written for Megatron-LM; plain ones can"
        )
    args = args_of(stored.model, stored.vocab_size, stored.seq_len)
    natives = list(native_tensors(stored.model, stored.vocab_size))
    reader = NativeReader(stored.checkpoint, natives)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already; name a new folder")
    args |= {"bf16": reader.dtype == torch.bfloat16, "params_dtype": reader.dtype}
    iteration = int(stored.meta["step"])
    folder = out / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    try:
        write_weights(folder, natives, reader.dtype, reader.read)
        common = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": iteration}
        torch.save(common, folder / "common.pt")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (out / LATEST).write_text(f"{iteration}\n")
    return folder


def _iteration(folder: Path) -> Path:
    if (folder / ".metadata").is_file():
        return folder
    latest = folder / LATEST
    if latest.is_file():
        name = latest.read_text().strip()
        folder = folder / (name if name == "release" else f"iter_{name:0>7}")
        if (folder / ".metadata").is_file():
            return folder
    if any(folder.glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder}: is in Megatron-LM's legacy format (mp_rank_XX), which is not read; load it there and save it "
            "with --ckpt-format torch_dist"
        )
    what = f"no {LATEST} and no .metadata in it" if folder.is_dir() else "no such folder"
    raise CheckpointError(f"{folder}: not a checkpoint of Megatron-LM ({what})")


class _Inert:
    """Stands for a class of Megatron-LM that `args` mentions (enums, mostly): holds nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)


def read_args(path: Path) -> dict[str, Any]:
    """The arguments that Megatron-LM saved in `common.pt`; nothing in it is run. Raises CheckpointError."""
    file = path / "common.pt"
    try:
        # Whatever class the file names, it gets one of ours that does nothing.
        named = [name for name in get_unsafe_globals_in_checkpoint(file) if name != "argparse.Namespace"]
        stand_ins: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in named]
        with safe_globals([Namespace, *stand_ins]):
            common = torch.load(file, map_location="cpu", weights_only=True)
        return vars(common["args"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no common.pt in it; not a whole checkpoint of Megatron-LM") from None
    except (KeyError, TypeError):
        raise CheckpointError(f"{file}: holds no `args`; the checkpoint was not saved by Megatron-LM") from None
    except Exception as error:  # a damaged pickle raises anything
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: cannot be read: {type(error).__name__}: {first}") from None


def model_of(args: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that Megatron-LM makes of `args`. Raises ConfigError, naming `where`, when a run has no such model."""
    for key, allowed in UNSUPPORTED.items():
        value = args.get(key, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{where}: {key} = {value!r} is not supported")
    norm, biases, gated = args.get("normalization", "LayerNorm"), args.get("add_bias_linear", True), args.get("swiglu")
    qk_norm = bool(args.get("qk_layernorm", False))
    kind = (norm, bool(biases), bool(gated))
    family = next((name for name, f in FAMILIES.items() if kind == (f.normalization, f.biases, f.gated)), None)
    if family is None:
        raise ConfigError(
            f"{where}: normalization {norm} with add_bias_linear={biases} and swiglu={bool(gated)} is no known family; "
            "LayerNorm with biases (wonton) and RMSNorm with swiglu and none (llama, qwen3) are"
        )
    if family == "llama" and qk_norm:
        family = "qwen3"
    options: dict[str, Any] = {}
    if family == "wonton":
        # Megatron-LM's fused bias and GELU, its default, is the tanh approximation.
        options = {"qk_norm": qk_norm, "activation": "gelu_tanh" if args.get("bias_gelu_fusion", True) else "gelu"}
    if args.get("use_rope_scaling"):
        factor = args.get("rope_scaling_factor", 8.0)
        options["rope_scaling"] = {"kind": "llama3", "factor": factor, "original_seq_len": LLAMA3_SEQ_LEN}
    heads = args.get("num_attention_heads")
    raw = {
        "family": family,
        "num_layers": args.get("num_layers"),
        "hidden_size": args.get("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": args.get("num_query_groups") if args.get("group_query_attention") else heads,
        "head_size": args.get("kv_channels"),
        "ffn_hidden_size": args.get("ffn_hidden_size"),
        "vocab_size": args.get("padded_vocab_size"),
        "rope_base": args.get("rotary_base", 10000),
        "norm_eps": args.get("norm_epsilon", 1e-5),
        "init_std": args.get("init_method_std", 0.02),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        **options,
    }
    return validated(ModelConfig, raw, f"{where}: args")


def args_of(model: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """The arguments for which Megatron-LM makes `model`; the inverse of `model_of`. Raises ConfigError."""
    family, scaling, own = FAMILIES[model.family], model.rope_scaling, activation(model)
    if family.gated and own != "silu":
        raise ConfigError(
            f"model.activation {own}: Megatron-LM has no argument for it in a gated MLP; silu can be written"
        )
    if scaling is not None and (scaling.kind != "llama3" or scaling.original_seq_len != LLAMA3_SEQ_LEN):
        raise ConfigError(
            f"model.rope_scaling {scaling.kind}: Megatron-LM has llama3 with original_seq_len {LLAMA3_SEQ_LEN} only"
        )
    if scaling is not None:
        for key, fixed in LLAMA3_DEFAULTS.items():
            if (value := getattr(scaling, key)) not in (None, fixed):
                raise ConfigError(
                    f"model.rope_scaling.{key} {value:g}: Megatron-LM has no argument for it and takes {fixed:g}"
                )
    args: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": query_groups(model) != model.num_attention_heads,
        "num_query_groups": query_groups(model),
        "kv_channels": head_size(model),
        "ffn_hidden_size": model.ffn_hidden_size,
        "padded_vocab_size": vocab_size,
        "seq_length": seq_len,
        "max_position_embeddings": seq_len,
        "position_embedding_type": "rope",
        "rotary_base": int(model.rope_base),
        "rotary_percent": 1.0,
        "normalization": family.normalization,
        "norm_epsilon": model.norm_eps,
        "qk_layernorm": has_qk_norm(model),
        "add_bias_linear": family.biases,
        "swiglu": family.gated,
        "bias_gelu_fusion": own == "gelu_tanh",
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "init_method_std": model.init_std,
        "use_rope_scaling": scaling is not None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if int(model.rope_base) != model.rope_base:
        raise ConfigError(f"model.rope_base {model.rope_base}: Megatron-LM takes whole numbers only")
    if scaling is not None:
        args["rope_scaling_factor"] = scaling.factor
    return args
