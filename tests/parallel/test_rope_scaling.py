"""Stretched rotary embeddings: transformers' frequencies, and attention that packing does not change."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headrace.errors import ConfigError
from headrace.validation import validated
from parallel.attention import PackedAttention, pack_documents
from parallel.rope_scaling import RopeScaling, attention_factor, scaled_base, scaled_frequencies
from parallel.rotary import rotary_table, rotate
from pretrain.config import ModelConfig
from pretrain.config.rope import RopeScalingConfig
from pretrain.convert.rope import rope_from_hf, rope_to_hf
from pretrain.rope import rope_scaling

CPU = torch.device("cpu")
SIZES = {"family": "llama", "num_layers": 1, "ffn_hidden_size": 8, "num_attention_heads": 2}


@st.composite
def scalings(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["linear", "yarn", "llama3"]))
    found: dict[str, Any] = {"kind": kind, "factor": draw(st.sampled_from([1.0, 2.0, 8.0, 40.0]))}
    if kind != "linear":
        found["original_seq_len"] = draw(st.sampled_from([64, 512, 8192]))
    if kind == "yarn" and draw(st.booleans()):
        found |= {"beta_fast": draw(st.sampled_from([8.0, 64.0])), "beta_slow": draw(st.sampled_from([0.5, 2.0]))}
        found["attention_factor"] = draw(st.none() | st.just(1.5))
    if kind == "llama3" and draw(st.booleans()):
        found |= {"low_freq_factor": 2.0, "high_freq_factor": 8.0}
    return found


@settings(deadline=None)
@given(raw=scalings(), head_size=st.sampled_from([4, 16, 64, 128]), base=st.sampled_from([100.0, 1e4, 5e5]))
def test_frequencies_are_those_of_transformers(raw: dict[str, Any], head_size: int, base: float) -> None:
    model = ModelConfig(**SIZES, hidden_size=2 * head_size, rope_base=base, rope_scaling=RopeScalingConfig(**raw))
    written = rope_to_hf(model)
    theirs = LlamaConfig(hidden_size=2 * head_size, num_attention_heads=2, max_position_embeddings=1 << 14, **written)
    expected, size = ROPE_INIT_FUNCTIONS[raw["kind"]](theirs, CPU)
    ours = rope_scaling(model.rope_scaling)
    assert ours is not None
    torch.testing.assert_close(scaled_frequencies(base, head_size, ours, CPU), expected, rtol=1e-6, atol=0)
    assert attention_factor(ours) == pytest.approx(size, rel=1e-6)
    cos, sin = rotary_table(9, head_size, base, torch.float32, CPU, ours)
    assert torch.allclose(cos**2 + sin**2, torch.full_like(cos, size**2), rtol=1e-5)
    # And back: what is written reads as what was configured, defaults filled in.
    read = rope_from_hf(written, "config.json")
    assert read["rope_base"] == base
    assert rope_scaling(read["rope_scaling"]) == ours


@given(factor=st.floats(1.0, 64.0), head_size=st.sampled_from([4, 64, 128]), base=st.sampled_from([100.0, 1e4]))
def test_ntk_leaves_the_first_pair_and_interpolates_the_last(factor: float, head_size: int, base: float) -> None:
    plain = base ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    found = scaled_frequencies(base, head_size, RopeScaling("ntk", factor), CPU)
    assert found[0] == plain[0] == 1.0
    assert float(found[-1]) == pytest.approx(float(plain[-1]) / factor, rel=1e-5)
    model = ModelConfig(
        **SIZES, hidden_size=2 * head_size, rope_base=base, rope_scaling=RopeScalingConfig(kind="ntk", factor=factor)
    )
    assert rope_to_hf(model) == {"rope_theta": scaled_base(base, head_size, factor)}


def test_yarn_sharpens_attention_by_the_papers_temperature() -> None:
    scaling = RopeScaling("yarn", 4.0, 1 << 20)  # so long that every pair of eight turns often: frequencies stay
    query, key = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1)).chunk(2)
    scores = []
    for used in (None, scaling):
        cos, sin = (table[3:4].unsqueeze(1) for table in rotary_table(4, 16, 10.0, torch.float32, CPU, used))
        scores.append(float((rotate(query, cos, sin) * rotate(key, cos, sin)).sum()))
    assert scores[1] == pytest.approx(scores[0] * (0.1 * math.log(4.0) + 1.0) ** 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_packing_changes_nothing_of_a_documents_attention(kind: Any) -> None:
    lengths, generator = [5, 1, 9], torch.Generator().manual_seed(2)
    scaling = RopeScaling(kind, 4.0, 8 if kind in ("yarn", "llama3") else 0, beta_fast=4.0)
    attention = PackedAttention(config=None, pg_collection=SimpleNamespace(cp=None))
    tensors = [torch.randn(sum(lengths), 2, 8, generator=generator) for _ in range(3)]

    def attend(parts: list[torch.Tensor], lengths: list[int], scaling: RopeScaling | None = scaling) -> torch.Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])
        documents = pack_documents(ends, positions, 9, 8, 10.0, torch.float32, rope_scaling=scaling)
        return attention(*parts, None, packed_seq_params=documents)

    packed = attend(tensors, lengths)
    alone = [
        attend(list(parts), [length])
        for *parts, length in zip(*(tensor.split(lengths) for tensor in tensors), lengths, strict=True)
    ]
    assert torch.equal(packed, torch.cat(alone))
    assert not torch.allclose(packed, attend(tensors, lengths, None))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "kind yarn needs original_seq_len"),
        ({"kind": "linear", "factor": 2.0, "original_seq_len": 8}, "original_seq_len is not an option of kind linear"),
        ({"kind": "llama3", "factor": 2.0, "original_seq_len": 8, "beta_fast": 1.0}, "beta_fast is not an option of"),
        ({"kind": "ntk", "factor": 0.5}, "factor: input should be greater than or equal to 1"),
        ({"kind": "yarn", "factor": 2.0, "original_seq_len": 8, "beta_slow": 40.0}, "beta_slow 40 must be below beta_"),
    ],
)
def test_what_cannot_be_meant(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(RopeScalingConfig, raw, "test")
    assert message in str(caught.value)
