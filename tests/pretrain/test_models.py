"""The models: right against an independent implementation, documents apart, sizes counted, weights free of layout."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process_group import run_ranks
from tiny_run import SEQ_LEN, VOCAB, tiny_batch, tiny_config, tiny_state

from parallel import process_groups
from parallel.layout import Layout
from pretrain.config import ModelConfig
from pretrain.microbatch import MicroBatch, split_batch
from pretrain.models.gpt import build_model
from pretrain.models.sizes import count_parameters, flops_per_token, head_size, query_groups
from pretrain.step import TrainState, place

FAMILIES = ["wonton", "llama", "qwen3"]


@pytest.fixture
def single_process() -> Iterator[None]:
    process_groups.initialize(Layout(1), seed=1)
    yield
    process_groups.shutdown()


def token_losses(state: TrainState, batch: MicroBatch) -> torch.Tensor:
    placed = place(batch, state)
    reported, _ = state.chunks[0](
        placed.input_ids, placed.position_ids, None, labels=placed.labels, packed_seq_params=placed.documents
    )
    return reported[0]


def logits(state: TrainState, batch: MicroBatch) -> torch.Tensor:
    placed = place(batch, state)
    with torch.no_grad():
        scores: torch.Tensor = state.chunks[0](
            placed.input_ids, placed.position_ids, None, packed_seq_params=placed.documents
        )
    return scores[0]


def plain_logits(weights: dict[str, torch.Tensor], config: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """The same model for one document, written out from the papers: [length, vocab]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        if config.family == "wonton":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight
        return x if bias is None else x + bias

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        out, bias = x @ weights[f"{name}.weight"].T, weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def rotate(x: torch.Tensor) -> torch.Tensor:  # as complex numbers, arXiv 2104.09864 equation 13
        half = x.size(-1) // 2
        angle = torch.arange(x.size(0))[:, None] * config.rope_base ** (-torch.arange(half) / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    length, groups, size = len(tokens), query_groups(config), head_size(config)
    per_group = config.num_attention_heads // groups
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}."
        mixed = linear(norm(x, prefix + "input_layernorm"), prefix + "self_attention.linear_qkv")
        mixed = mixed.view(length, groups, (per_group + 2) * size)
        q = mixed[..., : per_group * size].reshape(length, groups * per_group, size)
        k, v = mixed[..., per_group * size : -size], mixed[..., -size:]
        if config.family != "llama":
            q = norm(q, prefix + "self_attention.q_layernorm")
            k = norm(k, prefix + "self_attention.k_layernorm")
        q, k = rotate(q), rotate(k).repeat_interleave(per_group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(per_group, 1))
        x = x + linear(attended.reshape(length, -1), prefix + "self_attention.linear_proj")
        hidden = linear(norm(x, prefix + "pre_mlp_layernorm"), prefix + "mlp.linear_fc1")
        if config.family == "wonton":
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = gate * torch.sigmoid(gate) * up
        x = x + linear(hidden, prefix + "mlp.linear_fc2")
    x = norm(x, "decoder.final_layernorm")
    head = weights.get("output_layer.weight")
    return x @ (weights["embedding.word_embeddings.weight"] if head is None else head).T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_a_plain_implementation_run_document_by_document(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_embeddings=tied, rope_base=500.0, norm_eps=1e-3)
    state = tiny_state(config, Layout(1))
    with torch.no_grad():  # starting biases are 0 and norms 1, which would hide a missing one
        for parameter in state.chunks[0].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    weights = {name: value.detach() for name, value in state.chunks[0].named_parameters()}
    for batch in tiny_batch(0, micro_batch_size=4):
        losses, bounds = token_losses(state, batch), batch.cu_seqlens.tolist()
        assert len(bounds) > 5
        for start, end in itertools.pairwise(bounds):
            expected = plain_logits(weights, config.model, batch.input_ids[0, start:end])
            theirs = F.cross_entropy(expected, batch.labels[0, start:end], reduction="none")
            torch.testing.assert_close(losses[start:end], theirs, rtol=1e-5, atol=1e-5)
    process_groups.shutdown()


@pytest.mark.parametrize(("z_loss", "max_z_loss"), [(0.03, 0.0), (0.0, 0.02)])
def test_z_terms_are_minimised_and_not_reported(z_loss: float, max_z_loss: float) -> None:
    state = tiny_state(tiny_config("llama", z_loss=z_loss, max_z_loss=max_z_loss), Layout(1))
    batch = tiny_batch(0)[0]
    placed = place(batch, state)
    reported, minimised = state.chunks[0](
        placed.input_ids, placed.position_ids, None, labels=placed.labels, packed_seq_params=placed.documents
    )
    scores = logits(state, batch)
    torch.testing.assert_close(reported[0], F.cross_entropy(scores, batch.labels[0], reduction="none"))
    terms = z_loss * scores.logsumexp(1) ** 2 + max_z_loss * scores.amax(1) ** 2
    torch.testing.assert_close((minimised - reported)[0], terms, rtol=1e-4, atol=1e-5)
    process_groups.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_never_reaches_its_neighbours(family: str) -> None:
    state = tiny_state(tiny_config(family), Layout(1))
    starts = [np.array([0, 9, 20], dtype=np.int32), np.array([0, 1, 30], dtype=np.int32)]
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, SEQ_LEN + 1))
    [batch] = split_batch(tokens, starts, np.zeros(2, dtype=np.int64), 2)
    before, bounds = logits(state, batch), batch.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        [other] = split_batch(tokens, starts, np.zeros(2, dtype=np.int64), 2)
        other.input_ids[0, start:end] = (other.input_ids[0, start:end] + 1) % VOCAB
        after = logits(state, other)
        inside = torch.zeros(len(after), dtype=torch.bool)
        inside[start:end] = True
        assert torch.equal(after[~inside], before[~inside])
        assert (after[inside] != before[inside]).any(dim=1).all()
    process_groups.shutdown()


def test_tokens_do_not_see_their_future() -> None:
    state = tiny_state(tiny_config("llama"), Layout(1))
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, SEQ_LEN + 1))
    starts = [np.zeros(1, dtype=np.int32)]
    [batch] = split_batch(tokens, starts, np.zeros(1, dtype=np.int64), 1)
    before = logits(state, batch)
    batch.input_ids[0, 20] += 1
    after = logits(state, batch)
    assert torch.equal(after[:20], before[:20])
    assert (after[20:] != before[20:]).any(dim=1).all()
    process_groups.shutdown()


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group
    return {
        "family": draw(st.sampled_from(FAMILIES)),
        "num_layers": draw(st.integers(1, 3)),
        "hidden_size": heads * 2 * draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_size": draw(st.none() | st.sampled_from((2, 6))),
        "ffn_hidden_size": 2 * draw(st.integers(1, 20)),
        "qk_norm": draw(st.none() | st.booleans()),
        "tie_embeddings": draw(st.booleans()),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=models(), vocab_size=st.integers(1, 40))
def test_parameters_are_counted_as_built(single_process: None, numbers: dict[str, Any], vocab_size: int) -> None:
    config = ModelConfig(**numbers)
    [chunk] = build_model(config, Layout(1), seq_len=8, vocab_size=vocab_size)
    assert count_parameters(config, vocab_size) == sum(parameter.numel() for parameter in chunk.parameters())


def test_operations_of_a_known_model() -> None:
    # GPT-3 175B (arXiv 2005.14165, table D.1): 3.14e23 operations for 3e11 tokens, 6 for every parameter.
    config = ModelConfig(
        family="wonton", num_layers=96, hidden_size=12288, num_attention_heads=96, ffn_hidden_size=49152
    )
    full, causal = flops_per_token(config, 50257, 2048)
    scores = 12 * 96 * 12288 * 2048
    assert full - causal == scores // 2
    assert full - scores == pytest.approx(3.14e23 / 3e11, rel=0.01)


@pytest.mark.usefixtures("single_process")
def test_starting_weights_have_gpt2s_scale() -> None:
    config = ModelConfig(
        family="wonton",
        num_layers=8,
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=256,
        init_std=0.05,
    )
    [chunk] = build_model(config, Layout(1), seq_len=8, vocab_size=256)
    for name, value in chunk.named_parameters():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            scaled = 0.05 / 4 if "linear_proj" in name or "linear_fc2" in name else 0.05
            assert float(value.std()) == pytest.approx(scaled, rel=0.05)
            assert float(value.mean()) == pytest.approx(0.0, abs=0.1 * scaled)
    layers = [layer.mlp.linear_fc1.weight for layer in chunk.decoder.layers]
    assert not torch.equal(layers[0], layers[1])


@pytest.mark.usefixtures("single_process")
def test_the_seed_alone_decides_the_weights() -> None:
    config = tiny_config("llama").model
    torch.manual_seed(1)
    [one] = build_model(config, Layout(1), SEQ_LEN, VOCAB, seed=7)
    torch.manual_seed(2)
    [same] = build_model(config, Layout(1), SEQ_LEN, VOCAB, seed=7)
    [other] = build_model(config, Layout(1), SEQ_LEN, VOCAB, seed=8)
    weights = [dict(chunk.named_parameters()) for chunk in (one, same, other)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
        assert "norm" in name or not torch.equal(value, weights[2][name])


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, tensor_parallel_size=2),
        Layout(2, pipeline_parallel_size=2),
        Layout(2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_starting_weights_are_the_same_numbers_in_every_layout(layout: Layout, tied: bool) -> None:
    config = tiny_config("llama", tie_embeddings=tied)

    def values(layout: Layout) -> tuple[float, float]:
        state = tiny_state(config, layout)
        total = torch.zeros(2, dtype=torch.float64)
        seen = set()
        for chunk in state.chunks:
            for parameter in chunk.parameters():
                replicated = parameter.dim() == 1 and state.ranks.tp_rank > 0
                copied = getattr(parameter, "shared", False)  # the last stage's copy of a tied embedding
                if not (replicated or copied or id(parameter) in seen):
                    seen.add(id(parameter))
                    total += torch.stack((parameter.double().sum(), parameter.double().square().sum())).detach()
        totals = sum(process_groups.gather_objects(total), torch.zeros(2, dtype=torch.float64))
        if layout.world_size == 1:
            process_groups.shutdown()
        return float(totals[0]), float(totals[1])

    expected = values(Layout(1))
    for found in run_ranks(layout.world_size, values, layout):
        assert found == pytest.approx(expected, rel=1e-12)
