"""A plain PyTorch loop: a llama as one would write it, `scaled_dot_product_attention` on each document, fused AdamW."""

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.training.gate import Gate
from benchmarks.training.settings import Settings


class Attention(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.size = s.hidden // s.heads
        self.q_proj = nn.Linear(s.hidden, s.heads * self.size, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.groups * self.size, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.groups * self.size, bias=False)
        self.o_proj = nn.Linear(s.heads * self.size, s.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        """`x[tokens, hidden]`; `cos`, `sin` `[tokens, 1, size]`; documents begin and end at `bounds`."""
        q, k, v = (proj(x).view(len(x), -1, self.size) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        outs = []
        for start, end in itertools.pairwise(bounds):
            parts = (part[start:end].transpose(0, 1)[None] for part in (q, k, v))
            outs.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return self.o_proj(torch.cat(outs).flatten(1))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Mlp(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.ffn, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.ffn, bias=False)
        self.down_proj = nn.Linear(s.ffn, s.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(s.hidden, eps=s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, eps=s.eps)
        self.mlp = Mlp(s)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bounds)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=s.eps)


class PlainLlama(nn.Module):
    """Parameters are called as in transformers."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.model = Body(s)
        self.lm_head = nn.Linear(s.hidden, s.vocab, bias=False)
        size = s.hidden // s.heads
        angles = torch.outer(torch.arange(s.seq_len).float(), s.rope_base ** -(torch.arange(0, size, 2) / size))
        self.register_buffer("cos", torch.cat((angles, angles), 1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), 1).sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        """`tokens`, `positions` int64[tokens]; logits [tokens, vocab]."""
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, cos, sin, bounds)
        return self.lm_head(self.model.norm(x))


def packed_row(settings: Settings, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """(inputs, labels, positions, bounds) of a step's sequences in one row; -100 for a label of another document."""
    tokens, starts = settings.batch(step)
    labels = tokens[:, 1:].copy()
    bounds: list[int] = []
    for row, inner in enumerate(starts):
        labels[row, inner[1:] - 1] = -100
        bounds += (row * settings.seq_len + inner).tolist()
    bounds.append(settings.sequences * settings.seq_len)
    positions = np.concatenate([np.arange(end - start) for start, end in itertools.pairwise(bounds)])
    inputs = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]).reshape(-1))
    return inputs, torch.from_numpy(labels.reshape(-1)), torch.from_numpy(positions), bounds


def run(settings: Settings, weights: Path, gate: Gate) -> None:
    """Train for ever."""
    model = PlainLlama(settings)
    model.load_state_dict(torch.load(weights))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    gate.ready(parameters=sum(parameter.numel() for parameter in parameters))
    step = 0
    while True:
        inputs, labels, positions, bounds = packed_row(settings, step)
        loss = F.cross_entropy(model(inputs, positions, bounds), labels, ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        gate.step(loss.item())
        step += 1
