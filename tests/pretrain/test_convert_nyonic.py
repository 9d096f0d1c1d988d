"""Nyonic's public wonton checkpoints: random ones of that shape compute here what the public model computes."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from headrace.errors import CheckpointError, ConfigError
from pretrain.config import ModelConfig
from pretrain.convert.nyonic import from_nyonic
from pretrain.convert.stored_model import find_model
from pretrain.convert.verify import trainer_logits
from pretrain.models.presets import PRESETS
from pretrain.models.sizes import count_parameters

LAYERS, HIDDEN, FFN, HEADS, VOCAB = 3, 64, 256, 4, 96
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_over() -> Iterator[None]:
    """Closed groups live on in cycles; collected in a later test's forked child they would hang it (see run_ranks)."""
    yield
    gc.collect()


def random_tensors(qk_norm: bool, output_bias: bool = False) -> Tensors:
    """A state dict as `nyonic/model.py` of the public repository makes it, of a small model."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (VOCAB, HIDDEN), "linear.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"transformer_encoder.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.in_proj_", 3 * HIDDEN, HIDDEN),
            ("self_attn.out_proj_", HIDDEN, HIDDEN),
            ("linear1.", FFN, HIDDEN),
            ("linear2.", HIDDEN, FFN),
        ):
            shapes |= {f"{at}{name}weight": (rows, columns), f"{at}{name}bias": (rows,)}
        norms = {"norm1": HIDDEN, "norm2": HIDDEN}
        if qk_norm:
            norms |= {"self_attn.q_layer_norm": HIDDEN // HEADS, "self_attn.k_layer_norm": HIDDEN // HEADS}
        for name, size in norms.items():
            shapes |= {f"{at}{name}.weight": (size,), f"{at}{name}.bias": (size,)}
    shapes |= {"transformer_encoder.norm.weight": (HIDDEN,), "transformer_encoder.norm.bias": (HIDDEN,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1.0
    tensors["linear.bias"] = torch.full((VOCAB,), 0.25 if output_bias else 0.0)
    return tensors


def public_model(tensors: Tensors, tokens: torch.Tensor) -> torch.Tensor:
    """float32[tokens, vocabulary]: what the public model computes, written down once more."""
    size, positions = HIDDEN // HEADS, torch.arange(len(tokens), dtype=torch.float32)
    angles = torch.outer(positions, 10000.0 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}weight"], tensors[f"{name}bias"])

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-b, a), -1) * angles.sin()

    x = tensors["embedding.weight"][tokens]
    for layer in range(LAYERS):
        at = f"transformer_encoder.layers.{layer}."
        projected = linear(norm(x, f"{at}norm1"), f"{at}self_attn.in_proj_")
        q, k, v = (part.view(-1, HEADS, size) for part in projected.chunk(3, -1))
        if f"{at}self_attn.q_layer_norm.weight" in tensors:
            q, k = norm(q, f"{at}self_attn.q_layer_norm"), norm(k, f"{at}self_attn.k_layer_norm")
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        out = F.scaled_dot_product_attention(rotate(q)[None], rotate(k)[None], v[None], is_causal=True)[0]
        x = x + linear(out.transpose(0, 1).reshape(-1, HIDDEN), f"{at}self_attn.out_proj_")
        x = x + linear(F.gelu(linear(norm(x, f"{at}norm2"), f"{at}linear1.")), f"{at}linear2.")
    return F.linear(norm(x, "transformer_encoder.norm"), tensors["linear.weight"], tensors["linear.bias"])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("wrapped", ["module", "state_dict", None])
def test_the_logits_are_the_public_models(qk_norm: bool, wrapped: str | None, tmp_path: Path) -> None:
    tensors = random_tensors(qk_norm)
    prefix = "model." if wrapped == "state_dict" else ""  # that of a Lightning module, with what main.py leaves out
    stored = {prefix + name: tensor for name, tensor in tensors.items()}
    if wrapped == "state_dict":
        stored |= {"model.encoder_layer.norm1.weight": torch.ones(3), "model.final_norm.bias": torch.ones(3)}
    torch.save(stored if wrapped is None else {wrapped: stored, "epoch": 3}, tmp_path / "wonton.pt")
    model = from_nyonic(tmp_path / "wonton.pt", tmp_path / "run", heads=HEADS)
    assert model == ModelConfig(
        family="wonton",
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=HEADS,
        ffn_hidden_size=FFN,
        vocab_size=VOCAB,
        qk_norm=qk_norm,
    )
    tokens = torch.randint(0, VOCAB, (17,), generator=torch.Generator().manual_seed(1))
    expected = public_model(tensors, tokens)
    assert expected.abs().max() > 1
    assert (trainer_logits(find_model(tmp_path / "run", 0), tokens) - expected).abs().max() <= 1e-5


def test_a_bias_of_the_head_is_not_dropped_unsaid(tmp_path: Path) -> None:
    torch.save({"module": random_tensors(True, output_bias=True)}, tmp_path / "wonton.pt")
    with pytest.raises(ConfigError, match=r"linear\.bias, the head's, is up to 0\.25.*--drop-output-bias"):
        from_nyonic(tmp_path / "wonton.pt", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert from_nyonic(tmp_path / "wonton.pt", tmp_path / "run", drop_output_bias=True).num_attention_heads == HEADS


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    def refused(tensors: object, message: str, kind: type[Exception] = CheckpointError) -> None:
        torch.save(tensors, tmp_path / "wonton.pt")
        with pytest.raises(kind, match=message):
            from_nyonic(tmp_path / "wonton.pt", tmp_path / "run", heads=HEADS)
        assert not (tmp_path / "run").exists()

    good = random_tensors(False)
    norm = "transformer_encoder.layers.1.norm1.bias"
    refused({name: tensor for name, tensor in good.items() if name != norm}, f"tensor {norm} is missing")
    refused(good | {norm: torch.zeros(5)}, r"has shape \(5,\), it should have \(64,\)")
    refused(good | {norm: torch.full((64,), float("nan"))}, "64 NaN or infinite of 64")
    refused(good | {"more": torch.zeros(1)}, "tensor more has no place")
    position = {"embedding.token_position_embedding.weight": torch.zeros(4, 4)}
    refused(good | position, "learned position embeddings", ConfigError)
    inner = "transformer_encoder.layers.0.linear1.weight"
    refused(good | {inner: torch.zeros(0, 64)}, r"wonton\.pt: ffn_hidden_size: .* got 0$", ConfigError)
    refused([1, 2], "holds no state dict")
    refused({"module": {"embedding.weight": torch.zeros(3, 4)}}, "is no wonton")
    (tmp_path / "wonton.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="not a readable"):
        from_nyonic(tmp_path / "wonton.pt", tmp_path / "run")
    with pytest.raises(CheckpointError, match="no such file"):
        from_nyonic(tmp_path / "nothing.pt", tmp_path / "run")


def test_the_public_shape() -> None:
    """32 layers of 4,096, FFN 16,384, 139,776 rows: 7.59 B parameters."""
    preset = PRESETS["wonton-6.7b"]
    public = preset.model_copy(update={"qk_norm": False})
    assert round(count_parameters(public, 139_776) / 1e9, 2) == 7.59
    assert preset.hidden_size // preset.num_attention_heads == 128
