"""transformers' Trainer on the data scheduler, with exact resume (needs transformers and accelerate).

    headrace data sample --out data/sample
    headrace tokenizer train --data data/sample --vocab-size 1024 --out data/tokenizer
    python examples/hf_trainer.py --out runs/hf      # stop it when you like, also with kill -9 …
    python examples/hf_trainer.py --out runs/hf      # … it goes on with the batches that would have come

Three things make it exact: the batches do not pass through accelerate's loader, which reads one batch ahead and deals
batches to ranks on its own; every checkpoint holds the scheduler's position; Trainer is told not to skip batches.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from data_scheduler import DataScheduler
from data_scheduler.state import load_state, save_state


class SchedulerTrainer(Trainer):
    """Trains on the scheduler's batches as they come; the scheduler already gives each rank its own."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=None)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Tensor:
        tokens, mask = inputs["tokens"], inputs["loss_mask"]
        # Positions begin at 0 in each document; without an attention mask transformers keeps attention inside them.
        logits = model(input_ids=tokens[:, :-1], position_ids=inputs["position_ids"], use_cache=False).logits
        loss = cross_entropy(logits[mask], tokens[:, 1:][mask])
        seen = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16]
        print(f"step {self.state.global_step}  batch {seen}  loss {loss.item():.9g}", flush=True)
        return loss


class SaveDataState(TrainerCallback):
    """Puts the scheduler's position into each checkpoint; with several ranks, each saves its own."""

    def __init__(self, scheduler: DataScheduler) -> None:
        self.scheduler = scheduler

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_state(checkpoint / f"data-{args.process_index}.npz", self.scheduler.state_dict())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/quickstart.yaml", help="its `data` section is used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=20)
    args = parser.parse_args(argv)

    settings = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        save_steps=args.save_every,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        ignore_data_skip=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    rank, ranks = settings.process_index, settings.world_size
    with settings.main_process_first(local=False):  # it writes the journal that the others read
        scheduler = DataScheduler.from_config(args.config, dp_rank=rank, dp_size=ranks, run_dir=args.out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=scheduler.scheduler.encoder.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=scheduler.scheduler.config.seq_len,
    )
    callbacks = [SaveDataState(scheduler)]
    trainer = SchedulerTrainer(LlamaForCausalLM(config), settings, train_dataset=scheduler, callbacks=callbacks)
    # A checkpoint without every rank's position was being written when the processes died.
    whole = [path for path in args.out.glob("checkpoint-*") if len(list(path.glob("data-*.npz"))) == ranks]
    newest = max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)
    if newest is not None:
        scheduler.load_state_dict(load_state(newest / f"data-{rank}.npz"))
        print(f"resumed from {newest.name}", flush=True)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))


if __name__ == "__main__":
    main()
