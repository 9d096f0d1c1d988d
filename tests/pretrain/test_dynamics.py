"""Numbers from inside the model: right against a float64 model written out, and the same under every layout."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
import torch
import torch.nn.functional as F
from process_group import run_ranks
from tiny_run import BATCH, PAIRS, tiny_batch, tiny_config, tiny_state, with_kernels

from data_scheduler import DataConfig
from headrace.errors import ConfigError
from parallel import process_groups
from parallel.attention import pack_documents
from parallel.layout import Layout
from pretrain.checkpoint import read_meta
from pretrain.config import ModelConfig, RunConfig, validate_config
from pretrain.dynamics import NoiseScale, activations
from pretrain.dynamics import attention as logits_of_attention
from pretrain.dynamics.attention import largest_logit
from pretrain.dynamics.noise_scale import MATRICES, estimate
from pretrain.metrics import METRICS, read_records
from pretrain.metrics.registry import OF_MACHINE
from pretrain.step import evaluate_step, train_step
from pretrain.train import train

Values = dict[str, Any]
LAYOUTS = PAIRS | {"tp2 pp2": Layout(4, tensor_parallel_size=2, pipeline_parallel_size=2)}
LR = 1e-3


def measured_steps(config: RunConfig, layout: Layout, steps: int = 3) -> list[Values]:
    state = tiny_state(config, layout)
    state.measured = True
    ranks, size, found = state.ranks, config.train.micro_batch_size, []
    for step in range(steps):
        result = train_step(state, tiny_batch(step, ranks.dp_rank, ranks.dp_size, size), LR)
        assert result.dynamics is not None
        found.append({**result.dynamics, "loss": result.loss, "grad_norm": result.grad_norm})
    if layout.world_size == 1:
        process_groups.shutdown()
    return found


@functools.cache
def single_process(text: str) -> list[Values]:
    return measured_steps(RunConfig.model_validate_json(text), Layout(1))


def assert_same(values: Values, expected: Values, tolerance: float = 1e-4) -> None:
    assert values.keys() == expected.keys()
    for name, value in values.items():
        # A mean of logits around 0 is what rounding leaves of them: it is held against their size.
        close = functools.partial(pytest.approx, rel=tolerance, abs=1e-6 if name == "output_logit_mean" else 0.0)
        assert value == close(expected[name]), name


# -- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_measures_what_one_process_does(name: str) -> None:
    config = tiny_config("qwen3", micro_batch_size=1, recompute="full" if "interleaved" in name else "none")
    ranks = run_ranks(LAYOUTS[name].world_size, measured_steps, config, LAYOUTS[name], timeout_s=120)
    for other in ranks[1:]:
        assert other == ranks[0]
    for values, expected in zip(ranks[0], single_process(config.model_dump_json()), strict=True):
        assert_same(values, expected)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["tp2+sp", "pp2"])
def test_biases_and_tied_embeddings_count_once(name: str) -> None:
    config = tiny_config("wonton", micro_batch_size=1, tie_embeddings=True)
    [first, *_] = run_ranks(2, measured_steps, config, LAYOUTS[name], 1, timeout_s=120)
    assert_same(first[0], single_process(config.model_dump_json())[0])
    assert "output" not in first[0]["weight_rms"]  # they are the embedding's


@pytest.mark.multiprocess
def test_in_bf16_the_optimizers_own_weights_are_measured() -> None:
    config = tiny_config("qwen3", micro_batch_size=1, precision="bf16")
    single = single_process(config.model_dump_json())[0]
    sharded = run_ranks(2, measured_steps, config, LAYOUTS["dp2 distributed optimizer"], 1, timeout_s=120)[0][0]
    exact = single_process(tiny_config("qwen3", micro_batch_size=1).model_dump_json())[0]
    for name in ("max_attention_logit", "query_norm", "block_output_rms", "gradient_rms", "weight_rms", "update_rms"):
        assert single[name] == pytest.approx(sharded[name], rel=1e-2), name
        assert single[name] == pytest.approx(exact[name], rel=5e-2), name
    # Updates of 1e-3 to norms at 1.0, where neighbours in bf16 are 4e-3 or 8e-3 apart.
    assert single["update_rms"]["final_norm"] == pytest.approx(LR, rel=1e-3)


# -- one process ----------------------------------------------------------------------------------------------------


def plain_model(
    weights: dict[str, torch.Tensor], config: ModelConfig, tokens: torch.Tensor, starts: torch.Tensor, seen: Values
) -> torch.Tensor:
    """Logits of a row of documents by a `qwen3` written out with one mask over the whole row; fills in `seen`."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]

    place = torch.arange(len(tokens))
    half = config.hidden_size // config.num_attention_heads // 2
    angle = torch.outer(place - starts, config.rope_base ** -(torch.arange(half).double() / half))[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    groups = config.num_query_groups
    assert groups is not None
    heads = config.num_attention_heads // groups
    allowed = (place[None] <= place[:, None]) & (place[None] >= starts[:, None])
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(config.num_layers):
        name = f"decoder.layers.{layer}."
        mixed = norm(x, name + "input_layernorm") @ weights[name + "self_attention.linear_qkv.weight"].T
        mixed = mixed.view(len(tokens), groups, heads + 2, 2 * half)
        q = norm(mixed[:, :, :heads].flatten(1, 2), name + "self_attention.q_layernorm")
        k, v = norm(mixed[:, :, heads], name + "self_attention.k_layernorm"), mixed[:, :, heads + 1]
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k).repeat_interleave(heads, 1)) / math.sqrt(2 * half)
        scores = scores.masked_fill(~allowed, -math.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(heads, 1))
        x = x + mixed.flatten(1) @ weights[name + "self_attention.linear_proj.weight"].T
        gate, up = (norm(x, name + "pre_mlp_layernorm") @ weights[name + "mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ weights[name + "mlp.linear_fc2.weight"].T
        for key, value in {"scores": scores.amax(), "q": q.norm(dim=-1), "k": k.norm(dim=-1), "x": x}.items():
            seen.setdefault((key, str(layer)), []).append(value.detach())
    logits = norm(x, "decoder.final_layernorm") @ weights["output_layer.weight"].T
    seen.setdefault("logits", []).append(logits.detach())
    return logits


def part_of(name: str) -> str:
    """The part of the model that a parameter is in."""
    words = name.split(".")
    edges = {"embedding": "embedding", "output_layer": "output"}
    return words[2] if words[1] == "layers" else edges.get(words[0], "final_norm")


def rms(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).square().mean().sqrt())


def test_values_are_those_of_a_float64_model_written_out() -> None:
    config = tiny_config("qwen3", micro_batch_size=2)
    state = tiny_state(config, Layout(1))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms of 1 would hide a missing one
        for parameter in state.chunks[0].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    state.optimizer.reload_model_params()
    weights = {
        name: value.detach().double().clone().requires_grad_() for name, value in state.chunks[0].named_parameters()
    }
    batch, seen = tiny_batch(0, micro_batch_size=2), {}
    losses, tokens = [], []
    for each in batch:
        bounds = each.cu_seqlens.long()
        starts = bounds[:-1].repeat_interleave(bounds.diff())
        logits = plain_model(weights, config.model, each.input_ids[0], starts, seen)
        losses.append(F.cross_entropy(logits, each.labels[0], reduction="none")[each.loss_mask[0]].sum())
        tokens.append(int(each.loss_mask.sum()))
    by_batch = [torch.autograd.grad(loss, list(weights.values())) for loss in losses]
    total = dict(zip(weights, (sum(parts) / sum(tokens) for parts in zip(*by_batch, strict=True)), strict=True))
    before = {name: value.detach().clone() for name, value in weights.items()}
    matrices = [value for value in weights.values() if value.dim() == 2]
    others = [value for value in weights.values() if value.dim() == 1]
    for name, value in weights.items():
        value.grad = total[name].clone()
    torch.nn.utils.clip_grad_norm_(weights.values(), config.optimizer.clip_grad)
    decay = {"params": matrices, "weight_decay": config.optimizer.weight_decay}
    adam = torch.optim.AdamW([decay, {"params": others, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95), eps=1e-8)
    adam.step()

    state.measured = True
    result = train_step(state, batch, LR)
    values: Values = dict(result.dynamics or {})
    assert result.grad_norm > config.optimizer.clip_grad  # so that measuring after clipping would show
    layers = [str(layer) for layer in range(config.model.num_layers)]
    expected: Values = {
        "max_attention_logit": {layer: max(map(float, seen["scores", layer])) for layer in layers},
        "query_norm": {layer: float(torch.cat(seen["q", layer]).mean()) for layer in layers},
        "key_norm": {layer: float(torch.cat(seen["k", layer]).mean()) for layer in layers},
        "block_output_rms": {layer: rms(seen["x", layer]) for layer in layers},
        "output_logit_mean": float(torch.cat(seen["logits"]).mean()),
        "mlp_gradient_rms": {layer: rms([total[f"decoder.layers.{layer}.mlp.linear_fc1.weight"]]) for layer in layers},
    }
    for name, of in (
        ("weight_rms", before),
        ("gradient_rms", total),
        ("update_rms", {name: value.detach() - before[name] for name, value in weights.items()}),
    ):
        parts = {part_of(each): [value for key, value in of.items() if part_of(key) == part_of(each)] for each in of}
        expected[name] = {part: rms(tensors) for part, tensors in parts.items()}
    measured = [number for number, name in enumerate(weights) if name.endswith(MATRICES)]
    assert len(measured) == 4 * len(layers)
    small = sum(
        sum(float(gradients[number].square().sum()) for number in measured) / count
        for gradients, count in zip(by_batch, tokens, strict=True)
    )
    large = sum(float(value.square().sum()) for name, value in total.items() if name.endswith(MATRICES))
    # Equation A.2 of arXiv 1812.06162 has batches of one size; these differ in their tokens, by a few in 60.
    noise = estimate(len(batch), sum(tokens), small, large)
    assert noise is not None
    expected |= {"gradient_variance": noise.variance, "gradient_signal": noise.signal}
    if noise.signal > 0:
        expected["noise_scale"] = noise.variance / noise.signal
    assert_same(values, expected, 1e-5)
    process_groups.shutdown()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_is_not_seen(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Norms as torch computes them: ours is one pass with the addition before it, but where blocks are recomputed whole.
    plain_config = with_kernels(tiny_config("qwen3", micro_batch_size=1), residual_norm="torch")
    plain = single_process(plain_config.model_dump_json())
    calls = []
    monkeypatch.setattr(activations, "largest_logit", lambda *given: calls.append(0) or largest_logit(*given))
    config = with_kernels(tiny_config("qwen3", micro_batch_size=1, recompute=recompute), residual_norm="torch")
    assert measured_steps(config, Layout(1), 1) == plain[:1]
    assert len(calls) == BATCH * config.model.num_layers


def test_micro_batches_of_another_size_change_the_small_batches_only() -> None:
    one, four = (single_process(tiny_config("qwen3", micro_batch_size=size).model_dump_json())[0] for size in (1, 4))
    noise = {"gradient_variance", "gradient_signal", "noise_scale"}
    assert_same(*({key: value for key, value in each.items() if key not in noise} for each in (one, four)))
    assert one["gradient_variance"] != four["gradient_variance"]
    assert one["gradient_variance"] == pytest.approx(four["gradient_variance"], rel=0.02)  # estimates of one thing
    whole = single_process(tiny_config("qwen3", micro_batch_size=BATCH).model_dump_json())[0]
    assert not noise & whole.keys()  # one batch alone says nothing of noise


def test_measuring_changes_nothing_and_leaves_nothing_behind() -> None:
    config = tiny_config("qwen3")

    def run(measured: tuple[bool, ...]) -> list[tuple[float, float, bool]]:
        state, found = tiny_state(config, Layout(1)), []
        for step, watch in enumerate(measured):
            state.measured = watch
            result = train_step(state, tiny_batch(step), LR)
            evaluate_step(state, tiny_batch(100))
            found.append((result.loss, result.grad_norm, result.dynamics is not None))
        hooks = [module._forward_hooks for module in state.chunks[0].modules()]
        hooks += [parameter._post_accumulate_grad_hooks for parameter in state.chunks[0].parameters()]
        assert not any(hooks)
        assert all(layer.self_attention.core_attention.observer is None for layer in state.chunks[0].decoder.layers)
        process_groups.shutdown()
        return found

    watched, plain = run((True, False, True)), run((False, False, False))
    assert [step[:2] for step in watched] == [step[:2] for step in plain]
    assert [step[2] for step in watched] == [True, False, True]


def test_an_update_that_is_skipped_has_no_size() -> None:
    state = tiny_state(tiny_config("llama"), Layout(1))
    state.measured = True
    norm = state.chunks[0].decoder.layers[2].pre_mlp_layernorm.weight
    with torch.no_grad():
        norm[0] = math.inf
    result = train_step(state, tiny_batch(1), LR)
    values: Values = dict(result.dynamics or {})
    assert result.skipped
    assert values["update_rms"] == {}
    assert [math.isfinite(value) for value in values["block_output_rms"].values()] == [True, True, False, False]
    assert values["max_attention_logit"]["3"] == math.inf
    assert "noise_scale" not in values
    assert state.noise_scale.state() == NoiseScale().state()
    process_groups.shutdown()


# -- attention logits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5], [1, 1, 3], [40], [3, 17, 1, 30, 8], [16, 16, 16]])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)])
def test_the_largest_logit_is_exact(
    lengths: list[int], heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits_of_attention, "LOGITS", 1)  # stretches of 16 queries
    random = torch.Generator().manual_seed(sum(lengths))
    tokens, width = sum(lengths), 4
    edges = [0, *itertools.accumulate(lengths)]
    starts = torch.tensor(edges[:-1]).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(tokens)
    documents = pack_documents(torch.tensor(edges, dtype=torch.int32), place - starts, 64, width, 1e4, torch.float32)
    for draw in range(8):
        query, key = torch.randn(tokens, heads, width, generator=random), torch.randn(tokens, groups, width)
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(heads // groups, 1))
        allowed = (place[None] <= place[:, None]) & (place[None] >= starts[:, None])
        expected = float(scores.masked_fill(~allowed, -math.inf).amax())
        scale = None if draw % 2 else 0.25
        assert float(largest_logit(query, key, documents, scale)) == pytest.approx(
            expected * (scale or width**-0.5), rel=1e-6
        )


def test_frozen_matrices_have_no_part_in_the_noise() -> None:
    # A single matrix is trained: with equal micro-batches there is nothing that its gradients differ by.
    state = tiny_state(tiny_config("qwen3", micro_batch_size=2), Layout(1))
    state.measured = True
    state.stage = state.stage._replace(trainable=("decoder.layers.2.mlp.linear_fc2.weight",))
    values = train_step(state, [tiny_batch(0)[0]] * 4, LR).dynamics
    assert values is not None
    signal, tokens = values["gradient_signal"], 4 * float(tiny_batch(0)[0].loss_mask.sum())
    assert isinstance(signal, float)
    assert values["gradient_variance"] == pytest.approx(0.0, abs=1e-4 * signal * tokens)
    process_groups.shutdown()


# -- records and configuration --------------------------------------------------------------------------------------


def test_every_value_is_in_the_list_of_metrics() -> None:
    listed = {metric.name: metric for metric in METRICS}
    [values, *_] = single_process(tiny_config("qwen3", micro_batch_size=1).model_dump_json())
    for name, value in {**values, "noise_scale": 1.0}.items():
        assert listed[name].exported
        assert (listed[name].label == "layer") == isinstance(value, dict), name


def test_a_resumed_run_records_what_an_uninterrupted_one_does(
    data_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    def run(name: str, steps: int) -> tuple[list[Values], Values]:
        raw = tiny_config("llama", num_layers=2, hidden_size=32, ffn_hidden_size=64).model_dump()
        raw["run"]["dir"] = str(tmp_path / name)
        raw["data"] = data_config(seq_len=32, global_batch_size=8, lanes=8).model_dump()
        raw["optimizer"]["schedule"] = "constant"
        raw["train"] |= {"steps": steps, "threads": 1, "eval_sequences": 0}
        raw["metrics"] |= {"progress": False, "dynamics": {"every": 2}}
        raw["model"]["vocab_size"] = None
        log = tmp_path / f"{name}.log"
        assert child_process.run(lambda: train(validate_config(raw, name)), log) == 0, log.read_text()
        checkpoint = read_meta(tmp_path / name / "checkpoints" / f"step-{steps:08d}")
        return list(read_records(tmp_path / name / "metrics.jsonl")), checkpoint["noise_scale"]

    whole, averages = run("whole", 5)
    run("again", 3)
    again, resumed = run("again", 5)
    assert averages["variance"] > 0.0
    assert resumed == averages
    for mine, theirs in zip(again, whole, strict=True):
        assert {key: mine[key] for key in mine.keys() - OF_MACHINE} == {
            key: theirs[key] for key in theirs.keys() - OF_MACHINE
        }
        assert ("query_norm" in mine) == (mine["step"] % 2 == 0)


def test_a_selection_cannot_be_measured() -> None:
    raw = tiny_config("llama").model_dump()
    raw["train"]["selection"] = {"kind": "loss_threshold", "options": {"threshold": 1.0}}
    validate_config(raw, "tiny")
    raw["metrics"]["dynamics"] = {"every": 10}
    with pytest.raises(ConfigError, match=r"metrics\.dynamics\.every: .*selection"):
        validate_config(raw, "tiny")
