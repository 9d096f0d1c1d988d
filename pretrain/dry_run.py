"""What `headrace train CONFIG --dry-run` says: a run's model, layout, batches, schedule and memory; nothing is started.

No process groups, no weights, no data: a recipe for 64 GPUs is checked on a laptop in a second. `describe` gives plain
data (`--json` prints it), `as_text` the same for people. What a real run would refuse about the layout is refused here
with the same error.
"""

import glob
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_scheduler.encoder import load_encoder
from data_scheduler.objectives.draw import Objectives
from data_scheduler.paths import is_url
from data_scheduler.stages import Turn, turns
from data_scheduler.timeline import Entry, Timeline
from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.layouts import layout_from, layouts_ahead
from pretrain.learning_rate import learning_rate
from pretrain.models.memory import Batch, Kernels, StageMemory, memory_by_stage, not_counted
from pretrain.models.sizes import (
    activation,
    block_parameters,
    count_parameters,
    embedding_parameters,
    flops_per_token,
    head_size,
    query_groups,
)
from pretrain.models.vocabulary import check_vocabulary, padded_vocab_size
from pretrain.models.weights import weight_names
from pretrain.name_patterns import check_patterns
from pretrain.stages import StageSettings, parallel_of, schedule_of, settings_of

MOST_RANKS = 16
"""Up to so many ranks are listed one by one; of more, the groups of rank 0."""


def describe(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Everything that can be known before a run of `config` on `world_size` processes starts; JSON-able.

    Raises ConfigError and LayoutError as the run would. Data and tokenizer may be missing, which `missing` then says.
    """
    model, train = config.model, config.train
    missing = list(_missing_data(config))
    tokens = _tokenizer_size(config, missing)
    known = model.vocab_size is not None or tokens is not None
    vocab_size = padded_vocab_size(config, tokens or 1)
    if tokens is not None:
        check_vocabulary(vocab_size, tokens)
    layout = layouts_ahead(config, world_size, vocab_size)[0]
    check_patterns(config, weight_names(model, layout.expert_parallel_size))
    if not known:
        vocab_size = 0  # what the embedding and the logits need cannot be said
        missing.append("vocabulary: not known without the tokenizer; embedding and logits are not counted")
    stretches = [_stretch(config, layout, vocab_size, *item) for item in _settings(config)]
    given = sum(stretch["steps"] * stretch["tokens_per_step"] for stretch in stretches)
    heaviest = max(stretches, key=lambda stretch: max(stage["total"] for stage in stretch["memory"]))
    return {
        "run": config.run.dir,
        "model": {
            **model.model_dump(exclude={"init_std", "z_loss", "max_z_loss", "tie_embeddings"}, exclude_none=True),
            "tie_embeddings": model.tie_embeddings,
            "vocab_size": vocab_size or None,
            "num_query_groups": query_groups(model),
            "head_size": head_size(model),
        },
        "parameters": {
            "total": count_parameters(model, vocab_size),
            "embedding": embedding_parameters(model, vocab_size),
            "block": block_parameters(model),
        },
        "layout": {
            **asdict(layout),
            "data_parallel_size": layout.data_parallel_size,
            "text": str(layout),
            "groups_of_rank_0": _groups(layout),
        },
        "batches": [
            {key: value for key, value in stretch.items() if key not in ("memory", "not_counted")}
            for stretch in stretches
        ],
        "steps": train.steps,
        "sequences": sum(stretch["steps"] * stretch["global_batch_size"] for stretch in stretches),
        "tokens": given,
        "flops": sum(  # as a float: past 64 bits
            float(stretch["steps"] * stretch["tokens_per_step"] * stretch["flops_per_token"]["full"])
            for stretch in stretches
        ),
        "learning_rate": _schedule(config),
        "precision": train.precision,
        "recompute": train.recompute,
        "memory": heaviest["memory"],
        "missing": missing + heaviest["not_counted"],
    }


def _missing_data(config: RunConfig) -> Iterator[str]:
    for source in config.data.sources:
        for key, paths in (("paths", source.paths), ("val_paths", source.val_paths)):
            for path in paths:
                if not is_url(path) and not glob.glob(str(Path(path).expanduser()), recursive=True):
                    yield f"data.sources.{source.name}.{key}: nothing at {path}"


def _tokenizer_size(config: RunConfig, missing: list[str]) -> int | None:
    """Tokens of the tokenizer; None, and a word in `missing`, where there is none."""
    path = Path(config.data.tokenizer)
    if not path.exists():
        missing.append(f"data.tokenizer: nothing at {path}")
        return None
    encoder = load_encoder(path, fast=False)
    for source in config.data.sources:
        if objectives := config.data.objectives_of(source):
            Objectives(objectives, encoder, source.name)  # raises ConfigError for special tokens that there are not
    return encoder.vocab_size


def _settings(config: RunConfig) -> Iterator[tuple[int, int, StageSettings]]:
    """(first step, steps, what holds) of every stretch of the run with one batch shape."""
    steps = config.train.steps
    changes = [turn for turn in turns(config.data, steps, Timeline()) if turn.step < steps]
    ends = [turn.step for turn in changes[1:]] + [steps]
    for turn, end in zip(changes, ends, strict=True):
        yield turn.step, end - turn.step, settings_of(config, turn.data)


def _stretch(
    config: RunConfig, layout: Layout, vocab_size: int, first: int, steps: int, settings: StageSettings
) -> dict[str, Any]:
    size, micro = settings.global_batch_size, settings.micro_batch_size
    own, scaling = layout_from(parallel_of(config, settings.number), layout.world_size), settings.rope_scaling
    if own.data_parallel_size:  # else it is of a stage that is over, with more processes
        layout = own
    batch = Batch(settings.seq_len, micro, size // layout.data_parallel_size // micro)
    train = config.train
    full, causal = flops_per_token(config.model, vocab_size, settings.seq_len)
    stages = memory_by_stage(
        config.model, vocab_size, layout, batch, train.precision, train.recompute, kernels_of(config), config.optimizer
    )
    return {
        **settings._asdict(),
        "rope_scaling": scaling and scaling.model_dump(exclude_none=True),
        "trainable": None if settings.trainable is None else list(settings.trainable),
        "layout": str(layout),
        "first_step": first,
        "steps": steps,
        "micro_batches": batch.micro_batches,
        "tokens_per_step": size * settings.seq_len,
        "flops_per_token": {"full": full, "causal": causal},
        "memory": [_memory(stage) for stage in stages],
        "not_counted": [f"memory: {line}" for line in not_counted(config.model, layout)],
    }


def kernels_of(config: RunConfig) -> Kernels:
    """What the estimate takes for granted: a run in bf16 or fp16 is for a GPU, one in fp32 for a CPU."""
    gpu = config.train.precision != "fp32"
    gate = "swiglu" if activation(config.model) == "silu" else "geglu"
    keys = {
        "fused_gate": gate,
        "fused_norms": "residual_norm",
        "fused_qk_norm_rope": "qk_norm_rope",
        "fused_head": "head",
    }
    choices = {field: getattr(config.kernels, key) for field, key in keys.items()}
    if not gpu:
        from parallel.kernels.choice import choose, kernels

        for field, key in keys.items():
            choices[field] = choose(kernels()[key], choices[field], "cpu")[0]
    return Kernels(gpu=gpu, **{field: choice == "fused" for field, choice in choices.items()})


def _memory(stage: StageMemory) -> dict[str, int]:
    return {**stage._asdict(), "total": stage.total}


def _groups(layout: Layout) -> dict[str, str]:
    """Rank 0's partners in every direction; all other groups are these, shifted."""
    stride, groups = 1, {}
    for name in ("tensor", "context", "data", "pipeline"):
        size = getattr(layout, f"{name}_parallel_size")
        ranks = [stride * position for position in range(size)]
        shown = ranks if size <= 4 else [*ranks[:2], "…", ranks[-1]]
        groups[name] = f"{size}: ranks {' '.join(map(str, shown))}" if size > 1 else "1"
        stride *= size
    return groups


def _schedule(config: RunConfig) -> dict[str, Any]:
    shape, settings = Timeline(), list(_settings(config))
    for order, (first, _, each) in enumerate(settings):
        turn = Turn(first, each.number, each.seq_len, each.global_batch_size)
        shape.put(Entry(first, order, turn.data, "config"))
    last = config.train.steps - 1
    own = config.optimizer
    return {
        "schedule": own.schedule,
        "peak": max(schedule_of(config, each.number).lr * each.lr_scale for *_, each in settings),
        "warmup_steps": own.warmup_steps,
        "warmup_tokens": own.warmup_tokens,
        "end": learning_rate(config, shape, last) * settings[-1][2].lr_scale,
    }


# -- for people -------------------------------------------------------------------------------------------------------


def as_text(plan: dict[str, Any]) -> str:
    """`plan` as aligned lines."""
    sections = [_model_lines(plan), _layout_lines(plan), _batch_lines(plan), _memory_lines(plan)]
    if plan["missing"]:
        sections.append([("missing", line) for line in plan["missing"]])
    return "\n\n".join("\n".join(f"{name:<18}{text}".rstrip() for name, text in lines) for lines in sections)


def _model_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    model, count = plan["model"], plan["parameters"]
    heads = f"{model['num_attention_heads']} heads of {model['head_size']}"
    if model["num_query_groups"] != model["num_attention_heads"]:
        heads += f" in {model['num_query_groups']} groups"
    vocabulary = f"{model['vocab_size']:,}" if model["vocab_size"] else "not known"
    return [
        ("model", f"{model.get('preset') or model['family']} ({model['family']})"),
        ("layers", f"{model['num_layers']} of {model['hidden_size']:,}, {heads}, FFN {model['ffn_hidden_size']:,}"),
        ("vocabulary", f"{vocabulary}, embeddings {'tied' if model['tie_embeddings'] else 'untied'}"),
        ("parameters", f"{count['total']:,} ({count['total'] / 1e9:.3f} B)"),
        ("  embedding", f"{count['embedding']:,}"),
        ("  each block", f"{count['block']:,}"),
    ]


def _layout_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    layout = Layout(**{key: plan["layout"][key] for key in Layout.__dataclass_fields__})
    sharded = ", optimizer state sharded (ZeRO-1)" if layout.distributed_optimizer else ""
    sharded += ", weights, gradients and optimizer state sharded (ZeRO-3)" if layout.fully_sharded else ""
    lines = [("layout", f"{layout.world_size} {_plural('process', layout.world_size, 'es')}: {layout}{sharded}")]
    if 1 < layout.world_size <= MOST_RANKS:
        lines += [("" if number else "ranks", line) for number, line in enumerate(layout.rank_map().splitlines())]
    elif layout.world_size > 1:
        lines += [(f"  {name}", text) for name, text in plan["layout"]["groups_of_rank_0"].items()]
    return lines


def _batch_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for stretch in plan["batches"]:
        number = stretch["number"]
        name = "batch" if number is None else f"stage {number}"
        pieces = [
            f"{stretch['global_batch_size']:,} sequences of {stretch['seq_len']:,} = "
            f"{stretch['tokens_per_step']:,} tokens a step",
            f"{stretch['micro_batches']} {_plural('micro-batch', stretch['micro_batches'], 'es')} of "
            f"{stretch['micro_batch_size']} a rank",
        ]
        if stretch["layout"] != plan["layout"]["text"]:
            pieces.append(stretch["layout"])
        if len(plan["batches"]) > 1:
            pieces.append(f"from step {stretch['first_step']:,}, {stretch['steps']:,} steps")
        lines.append((name, "; ".join(pieces)))
    flops = plan["batches"][0]["flops_per_token"]
    rate = plan["learning_rate"]
    tokens = rate["warmup_tokens"]
    warmup = f"{rate['warmup_steps']:,} steps" if tokens is None else f"{_si(tokens)} tokens"
    return [
        *lines,
        ("run", f"{plan['steps']:,} steps, {plan['sequences']:,} sequences, {_si(plan['tokens'])} tokens"),
        (
            "operations",
            f"{_si(flops['full'])} FLOP a token with full attention, {_si(flops['causal'])} with its causal half; "
            f"the run {plan['flops']:.2e}",
        ),
        (
            "learning rate",
            f"{rate['schedule']}: {warmup} to {rate['peak']:.3g}, at the end {rate['end']:.3g}",
        ),
    ]


def _memory_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "recomputed", "inputs", "total")
    lines = [("memory, GB a rank", f"{plan['precision']}, recompute {plan['recompute']}; estimated")]
    lines.append(("", "".join(f"{part:>12}" for part in parts)))
    for stage in plan["memory"]:
        name = f"  stage {stage['stage']}" if len(plan["memory"]) > 1 else ""
        lines.append((name, "".join(f"{stage[part] / 1e9:>12.3f}" for part in parts)))
    return lines


def _plural(word: str, number: int, ending: str) -> str:
    return word if number == 1 else word + ending


def _si(number: float) -> str:
    """1234567 → 1.23 M."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:g}"
