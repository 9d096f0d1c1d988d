"""Lightning on the data scheduler, with exact resume (needs lightning).

    headrace data sample --out data/sample
    headrace tokenizer train --data data/sample --vocab-size 1024 --out data/tokenizer
    python examples/lightning_module.py --out runs/lightning      # stop it when you like, also with kill -9 …
    python examples/lightning_module.py --out runs/lightning      # … it goes on with the batches that would have come

Lightning fetches one batch ahead of the one it trains on, so the position to save is not where the scheduler stands: it
travels with each batch, and the training step says which batch was trained on.
"""

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_scheduler import DataScheduler


class Batches:
    """What Lightning iterates over; it puts `state_dict()` into its checkpoints."""

    def __init__(self, scheduler: DataScheduler) -> None:
        self.scheduler = scheduler
        self.trained: Mapping[str, Any] = scheduler.state_dict()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.scheduler:
            yield {**batch, "position": self.scheduler.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        # Tensors, because Lightning reads checkpoints back without pickle's arbitrary objects.
        return {key: torch.tensor(v) if isinstance(v, np.ndarray) else v for key, v in self.trained.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(state)
        self.trained = state


class TinyData(lightning.LightningDataModule):
    """One rank's batches; give `from_config` the rank and the number of ranks when there are several."""

    def __init__(self, config: str, run_dir: Path) -> None:
        super().__init__()
        self.batches = Batches(DataScheduler.from_config(config, run_dir=run_dir))

    def train_dataloader(self) -> Batches:
        return self.batches


class TinyModel(lightning.LightningModule):
    """A recurrent model: it reads each sequence from the left and forgets nothing at a document's end."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 64)
        self.recurrent = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, vocab_size)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        tokens, mask = batch["tokens"], batch["loss_mask"]
        logits = self.head(self.recurrent(self.embedding(tokens[:, :-1]))[0])
        loss = cross_entropy(logits[mask], tokens[:, 1:][mask])
        seen = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16]
        print(f"step {self.global_step}  batch {seen}  loss {loss.item():.9g}", flush=True)
        self.trainer.datamodule.batches.trained = batch["position"]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/quickstart.yaml", help="its `data` section is used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=20)
    args = parser.parse_args(argv)

    lightning.seed_everything(0, verbose=False)
    data = TinyData(args.config, args.out)
    model = TinyModel(data.batches.scheduler.scheduler.encoder.vocab_size)
    checkpoints = ModelCheckpoint(
        args.out / "checkpoints", "{step:06d}", every_n_train_steps=args.save_every, save_top_k=-1
    )
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints],
    )
    saved = sorted(args.out.glob("checkpoints/*.ckpt"))
    if saved:
        print(f"resumed from {saved[-1].name}", flush=True)
    trainer.fit(model, data, ckpt_path=saved[-1] if saved else None)


if __name__ == "__main__":
    main()
