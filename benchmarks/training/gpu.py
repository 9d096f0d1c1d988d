"""One GPU: our step beside megatron-core's own model, 1B and 3B llama shapes in bf16, sequences of 4,096 tokens.

`python -m benchmarks.training.gpu ARM SHAPE` is one arm in a process of its own, so that its peak of memory is its own:
`ours`, or `megatron`: `GPTModel` with megatron-core's TransformerEngine layers where that package is installed, else
its local ones, whose attention keeps all scores. Same schedule, optimizer and number of micro-batches; every sequence
is one document, since megatron-core's attention would see across.

MFU (PaLM, arXiv 2204.02311, appendix B) in both conventions, with attention counted in full and by its causal half, of
an H100's or H200's 989 TFLOP/s in dense bf16.
"""

import importlib.util
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from parallel import accelerator, process_groups
from parallel.engine import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    GPTModel,
    MegatronOptimizerConfig,
    TransformerConfig,
    finalize_model_grads,
    get_forward_backward_func,
    get_gpt_layer_local_spec,
    get_megatron_optimizer,
)
from parallel.layout import Layout
from pretrain.config import RunConfig, validate_config
from pretrain.microbatch import split_batch
from pretrain.models.sizes import flops_per_token, head_size, query_groups
from pretrain.step import build_state, train_step

PEAK_FLOPS = 989e12
ARMS = ("ours", "megatron")
TINY = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 128}


class Shape(NamedTuple):
    """What is trained, and how long."""

    preset: str
    micro_batch_size: int
    micro_batches: int = 4
    seq_len: int = 4096
    steps: int = 10
    changes: dict[str, Any] = {}  # noqa: RUF012  (never changed)


SHAPES = (Shape("llama-1b", 2), Shape("llama-3b", 1))
QUICK = (Shape("llama-1b", 1, 2, 64, 2, TINY | {"vocab_size": 256}),)


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row for every shape and arm. `quick`: a tiny shape, on whatever device there is."""
    if not quick and not accelerator.has_gpu():
        raise SystemExit("--device gpu: no GPU is at hand")
    rows = []
    for number, shape in enumerate(QUICK if quick else SHAPES):
        for arm in ARMS:
            command = [sys.executable, "-m", "benchmarks.training.gpu", arm, str(number), "quick" if quick else "full"]
            done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
            lines = done.stdout.splitlines()
            failed = {"shape": shape.preset, "arm": arm, "not_measured": f"ended with {done.returncode}"}
            rows.append(json.loads(lines[-1]) if done.returncode == 0 and lines else failed)
    return rows


def run_config(shape: Shape) -> RunConfig:
    sequences = shape.micro_batch_size * shape.micro_batches
    raw: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"preset": shape.preset, **shape.changes},
        "data": {
            "tokenizer": "unused",
            "sources": [{"name": "memory", "paths": ["unused"]}],
            "seq_len": shape.seq_len,
            "global_batch_size": sequences,
            "lanes": sequences,
        },
        "train": {
            "steps": 1, "micro_batch_size": shape.micro_batch_size, "precision": "bf16", "eval_sequences": 0
        },
    }  # fmt: skip
    return validate_config(raw, "benchmark")


def batch(shape: Shape, vocab_size: int, step: int) -> Any:
    """int64[sequences, seq_len + 1]"""
    sequences = shape.micro_batch_size * shape.micro_batches
    return np.random.default_rng(step).integers(0, vocab_size, (sequences, shape.seq_len + 1))


def run_ours(shape: Shape, config: RunConfig) -> Any:
    """A function that does a step and returns its loss."""
    vocab_size = config.model.vocab_size or 0
    ranks = process_groups.initialize(Layout(1), seed=1)
    state = build_state(config, Layout(1), ranks, vocab_size)

    def step(number: int) -> float:
        tokens = batch(shape, vocab_size, number)
        starts = [np.zeros(1, dtype=np.int32)] * len(tokens)
        parts = split_batch(tokens, starts, np.zeros(len(tokens), dtype=np.int64), shape.micro_batch_size)
        return train_step(state, parts, config.optimizer.lr).loss

    return step


def run_megatron(shape: Shape, config: RunConfig) -> Any:
    """The same with megatron-core's own parts."""
    model, vocab_size = config.model, config.model.vocab_size or 0
    process_groups.initialize(Layout(1), seed=1)
    megatron = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
        kv_channels=head_size(model),
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=accelerator.has_gpu(),
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
    )
    chunk = GPTModel(
        config=megatron,
        transformer_layer_spec=_stock_layers(),
        vocab_size=vocab_size,
        max_sequence_length=shape.seq_len,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rope_base),
    ).to(accelerator.device())
    wrapped = DistributedDataParallel(
        config=megatron,
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        module=Float16Module(megatron, chunk),
    )
    megatron.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam", lr=config.optimizer.lr, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0,
            bf16=True, params_dtype=torch.bfloat16,
        ),
        [wrapped],
        use_gloo_process_groups=False,
    )  # fmt: skip
    positions = torch.arange(shape.seq_len, device=accelerator.device()).expand(shape.micro_batch_size, -1)
    # TransformerEngine and the local layers make the causal mask themselves; the latter ask for one to be there.
    mask = torch.ones(1, 1, shape.seq_len, shape.seq_len, dtype=torch.bool, device=accelerator.device()).triu(1)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.mean(), {"loss": losses.detach().mean()}

    def forward_step(parts: Any, chunk: Any) -> Any:
        tokens = next(parts)
        return chunk(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous()), partial(mean)

    def step(number: int) -> float:
        tokens = torch.from_numpy(batch(shape, vocab_size, number)).to(accelerator.device())
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(tokens.split(shape.micro_batch_size)),
            model=wrapped,
            num_microbatches=shape.micro_batches,
            seq_length=shape.seq_len,
            micro_batch_size=shape.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        return float(sum(report["loss"] for report in reports)) / len(reports)

    return step


def has_transformer_engine() -> bool:
    return accelerator.has_gpu() and importlib.util.find_spec("transformer_engine") is not None


def _stock_layers() -> Any:
    if has_transformer_engine():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec()
    return get_gpt_layer_local_spec(normalization="RMSNorm")


def main() -> None:
    arm, number, length = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    shape = (QUICK if length == "quick" else SHAPES)[number]
    config = run_config(shape)
    step = {"ours": run_ours, "megatron": run_megatron}[arm](shape, config)
    losses = [step(warm_up) for warm_up in range(3)]
    accelerator.synchronize()
    began = time.perf_counter()
    losses += [step(3 + timed) for timed in range(shape.steps)]
    accelerator.synchronize()
    took = time.perf_counter() - began
    tokens = shape.steps * shape.micro_batches * shape.micro_batch_size * shape.seq_len
    full, causal = flops_per_token(config.model, config.model.vocab_size or 0, shape.seq_len)
    row = {
        "shape": shape.preset,
        "arm": arm,
        "layers": "own" if arm == "ours" else "TransformerEngine" if has_transformer_engine() else "local",
        "tokens_per_s": tokens / took,
        "mfu_full": full * tokens / took / PEAK_FLOPS,
        "mfu_causal": causal * tokens / took / PEAK_FLOPS,
        "peak_memory_bytes": accelerator.max_memory_allocated(),
        "device": accelerator.describe()["device"],
        "losses": losses,
    }
    print(json.dumps(row))
    process_groups.shutdown()


if __name__ == "__main__":
    main()
