"""A trained model that gives reference losses: read once, its weights never change."""

from dataclasses import replace
from pathlib import Path

from data_scheduler.encoder import Encoder
from data_scheduler.journal import Journal
from headrace.errors import CheckpointError, ConfigError
from headrace.validation import validated
from parallel.layout import Layout, validate
from parallel.process_groups import Ranks
from pretrain import checkpoint
from pretrain.config import KernelsConfig, ModelConfig, RunConfig
from pretrain.models.gpt import build_model
from pretrain.models.sizes import layout_shape
from pretrain.stages import first_settings
from pretrain.step import TrainState


def load_reference(config: RunConfig, layout: Layout, ranks: Ranks, encoder: Encoder) -> TrainState:
    """The model of `train.selection.reference` under the run's layout, in the precision it was saved in.

    Raises ConfigError when there is none there or its tokenizer is another, LayoutError when the layout does not fit
    it, CheckpointError when it is damaged.
    """
    selection = config.train.selection
    assert selection is not None
    assert selection.reference is not None
    folder = _folder(Path(selection.reference))
    meta = checkpoint.read_meta(folder)
    try:
        saved, vocab_size, precision = meta["config"]["model"], meta["model"]["vocab_size"], meta["model"]["precision"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'meta.json'}: {error} is missing; give another reference") from None
    _check_tokenizer(folder, encoder, vocab_size)
    model = validated(ModelConfig, saved, f"{folder / 'meta.json'}: config.model")
    train = config.train.model_copy(update={"precision": precision})
    own = config.model_copy(update={"model": model, "train": train})
    layout = replace(layout, fully_sharded=False)  # without optimizer state each rank holds its model-parallel part
    validate(layout, layout_shape(own, vocab_size))
    # What is asked of the run's kernels is asked of its own model; this one may be of another family or precision.
    kernels = {key: "auto" if value == "fused" else value for key, value in config.kernels.model_dump().items()}
    chunks = build_model(
        model,
        layout,
        config.data.seq_len,
        vocab_size,
        precision,
        "none",
        config.train.seed,
        KernelsConfig.model_validate(kernels),
    )
    for chunk in chunks:
        chunk.requires_grad_(False)
    # Its weights are of the stage they were trained in.
    of_stage = checkpoint.model_of_stage(model, meta)
    stage = first_settings(config)._replace(rope_base=of_stage.rope_base, rope_scaling=of_stage.rope_scaling)
    state = TrainState(chunks, list(chunks), None, own, layout, ranks, len(config.data.sources), stage)
    checkpoint.load_weights(folder, state)
    return state


def _folder(path: Path) -> Path:
    """The checkpoint that is meant: `path` itself, or the newest one of the run in `path`."""
    if (path / "meta.json").is_file():
        return path
    latest = checkpoint.Checkpoints(path).latest()
    if latest is None:
        raise ConfigError(
            f"train.selection.reference: {path} has no complete checkpoint; give a run folder or a folder such as "
            "RUN/checkpoints/step-00000100"
        )
    return latest


def _check_tokenizer(folder: Path, encoder: Encoder, vocab_size: int) -> None:
    """Losses of two models are compared token by token, so both must mean the same by a token."""
    journal = folder.parent.parent / "journal.jsonl"
    if journal.is_file():
        started = Journal(journal, writable=False).events[:1]
        if started and started[0].data.get("tokenizer") != encoder.fingerprint:
            raise ConfigError(
                f"train.selection.reference: the model in {folder} was trained with another tokenizer than "
                "data.tokenizer; give one of the same tokenizer"
            )
    if vocab_size < encoder.vocab_size:
        raise ConfigError(
            f"train.selection.reference: the model in {folder} knows {vocab_size} tokens, data.tokenizer has "
            f"{encoder.vocab_size}; give one of the same tokenizer"
        )
