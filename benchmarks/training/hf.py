"""Hugging Face `Trainer` with `LlamaForCausalLM` and its `sdpa` attention, on the same sequences.

Two forms: `hf` restarts `position_ids` in every document, from which transformers makes the mask that keeps documents
apart, so the loss is the same as ours; `hf_whole_rows` attends over whole sequences, its fast path, with another loss.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.training.gate import Gate
from benchmarks.training.plain import packed_row
from benchmarks.training.settings import Settings


class Rows(IterableDataset[dict[str, torch.Tensor]]):
    """Sequence after sequence, for ever."""

    def __init__(self, settings: Settings, documents: bool) -> None:
        self.settings, self.documents = settings, documents

    def __iter__(self) -> Any:
        step = 0
        while True:
            inputs, labels, positions, _ = packed_row(self.settings, step)
            shape = (self.settings.sequences, self.settings.seq_len)
            parts = [inputs.view(shape), labels.view(shape), positions.view(shape)]
            for row in range(self.settings.sequences):
                ids, wanted, places = (part[row] for part in parts)
                # transformers shifts `labels` itself; these are shifted already.
                item = {"input_ids": ids, "labels": wanted, "shift_labels": wanted}
                yield item | ({"position_ids": places} if self.documents else {})
            step += 1


class AtTheGate(TrainerCallback):
    def __init__(self, gate: Gate, parameters: int) -> None:
        self.gate, self.parameters = gate, parameters

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.gate.ready(parameters=self.parameters)


class GatedTrainer(Trainer):
    """A Trainer that says each step's loss to the gate; everything else is as it comes."""

    gate: Gate

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.last = super().training_step(*args, **kwargs)
        return self.last


class StepCallback(TrainerCallback):
    def __init__(self, trainer: GatedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.gate.step(float(self.trainer.last))


def run_rows(settings: Settings, weights: Path, gate: Gate) -> None:
    _run(settings, weights, gate, documents=True)


def run_whole_rows(settings: Settings, weights: Path, gate: Gate) -> None:
    _run(settings, weights, gate, documents=False)


def _run(settings: Settings, weights: Path, gate: Gate, documents: bool) -> None:
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.groups,
        max_position_embeddings=settings.seq_len,
        rms_norm_eps=settings.eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_base},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(torch.load(weights))
    arguments = TrainingArguments(
        output_dir=str(weights.parent / "hf"),
        per_device_train_batch_size=settings.sequences,
        max_steps=1_000_000,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GatedTrainer(model=model, args=arguments, train_dataset=Rows(settings, documents))
    trainer.gate = gate
    trainer.add_callback(AtTheGate(gate, sum(parameter.numel() for parameter in model.parameters())))
    trainer.add_callback(StepCallback(trainer))
    trainer.train()
