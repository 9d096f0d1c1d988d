"""Our arm: the step of a real run, `pretrain.step.train_step`, on batches that come from memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training.gate import Gate
from benchmarks.training.settings import Settings
from parallel import process_groups
from parallel.layout import Layout
from pretrain.config import RunConfig, validate_config
from pretrain.microbatch import split_batch
from pretrain.models.sizes import count_parameters
from pretrain.step import build_state, train_step


def run_config(settings: Settings, world_size: int) -> RunConfig:
    """The configuration of a run with this model and batch."""
    raw: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {
            "family": "llama",
            "num_layers": settings.layers,
            "hidden_size": settings.hidden,
            "num_attention_heads": settings.heads,
            "num_query_groups": settings.groups,
            "ffn_hidden_size": settings.ffn,
            "vocab_size": settings.vocab,
            "rope_base": settings.rope_base,
            "norm_eps": settings.eps,
        },
        "data": {
            "tokenizer": "unused",
            "sources": [{"name": "memory", "paths": ["unused"]}],
            "seq_len": settings.seq_len,
            "global_batch_size": settings.sequences,
            "lanes": settings.sequences,
        },
        "train": {"steps": 1, "micro_batch_size": settings.sequences // world_size, "eval_sequences": 0},
        "optimizer": {"lr": settings.lr, "weight_decay": settings.weight_decay, "clip_grad": settings.clip},
    }
    return validate_config(raw, "benchmark")


def run(settings: Settings, weights: Path, gate: Gate) -> None:
    """Train for ever; RANK and WORLD_SIZE as under torchrun say how many processes share the batch."""
    layout = Layout(int(os.environ.get("WORLD_SIZE", "1")))
    config = run_config(settings, layout.world_size)
    ranks = process_groups.initialize(layout, seed=1)
    state = build_state(config, layout, ranks, settings.vocab)
    if ranks.rank == 0:
        torch.save(dict(hf_weights(state.chunks[0], settings)), weights)
    sources = np.zeros(settings.sequences // layout.world_size, dtype=np.int64)
    mine = slice(ranks.dp_rank, None, ranks.dp_size)
    gate.ready(parameters=count_parameters(config.model, settings.vocab))
    step = 0
    while True:
        tokens, starts = settings.batch(step)
        microbatches = split_batch(tokens[mine], starts[mine], sources, config.train.micro_batch_size)
        gate.step(train_step(state, microbatches, settings.lr).loss)
        step += 1


def hf_weights(model: torch.nn.Module, settings: Settings) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under transformers' names for a llama, which `plain.py` has too."""
    names = {
        "embedding.word_embeddings": "model.embed_tokens",
        "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "mlp.linear_fc2": "mlp.down_proj",
    }
    for name, parameter in model.named_parameters():
        weight = parameter.detach().clone()
        own = name.removesuffix(".weight")
        layer, _, part = own.removeprefix("decoder.layers.").partition(".")
        there = f"model.layers.{layer}." if layer.isdecimal() else ""
        part = part if there else own
        if part == "self_attention.linear_qkv":
            queries, size = settings.heads // settings.groups, settings.hidden // settings.heads
            grouped = weight.view(settings.groups, queries + 2, size, settings.hidden)
            for letter, rows in zip("qkv", grouped.split((queries, 1, 1), dim=1), strict=True):
                yield f"{there}self_attn.{letter}_proj.weight", rows.reshape(-1, settings.hidden)
        elif part == "mlp.linear_fc1":
            gate, up = weight.chunk(2)
            yield f"{there}mlp.gate_proj.weight", gate
            yield f"{there}mlp.up_proj.weight", up
        else:
            yield f"{there}{names[part]}.weight", weight
