"""A plain PyTorch loop on the data scheduler, with exact resume.

headrace data sample --out data/sample
headrace tokenizer train --data data/sample --vocab-size 1024 --out data/tokenizer
python examples/plain_pytorch.py --out runs/plain      # stop it when you like, also with kill -9 …
python examples/plain_pytorch.py --out runs/plain      # … it goes on with the batches that would have come
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader

from data_scheduler import DataScheduler
from data_scheduler.state import load_state, save_state

WIDTH, HEADS = 64, 4


class TinyModel(nn.Module):
    """One attention layer, enough to show what batches are made of."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(seq_len, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH))
        self.head = nn.Linear(WIDTH, vocab_size)

    def forward(self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits [b, seq_len, vocabulary]; `cu_seqlens` keeps attention inside each document."""
        b, length = tokens.shape
        x = self.tokens(tokens) + self.positions(position_ids)
        q, k, v = self.qkv(x).view(b, length, 3 * HEADS, -1).transpose(1, 2).chunk(3, dim=1)
        document = torch.searchsorted(cu_seqlens, torch.arange(b * length), right=True).view(b, 1, length)
        mask = (document[..., :, None] == document[..., None, :]).tril()
        x = x + scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, length, -1)
        return self.head(x + self.mlp(x))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/quickstart.yaml", help="its `data` section is used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=20)
    args = parser.parse_args(argv)

    scheduler = DataScheduler.from_config(args.config, run_dir=args.out)
    # A DataLoader adds nothing here, but frameworks want one. The scheduler prepares batches ahead in a thread of its
    # own, so there are no workers; with num_workers > 0 it refuses in one line instead of giving every batch twice.
    batches = DataLoader(scheduler, batch_size=None, num_workers=0)

    torch.manual_seed(0)
    model = TinyModel(scheduler.scheduler.encoder.vocab_size, scheduler.scheduler.config.seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    step = 0
    if checkpoints := sorted(args.out.glob("step-*")):
        saved = torch.load(checkpoints[-1] / "model.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(load_state(checkpoints[-1] / "data.npz"))
        step = saved["step"]
        print(f"resumed after {step} steps", flush=True)

    for batch in batches:  # endless
        if step == args.steps:
            break
        inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits = model(inputs, batch["position_ids"], batch["cu_seqlens"])
        loss = cross_entropy(logits[batch["loss_mask"]], labels[batch["loss_mask"]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen = hashlib.sha256(batch["tokens"].numpy().tobytes()).hexdigest()[:16]
        print(f"step {step}  batch {seen}  loss {loss.item():.9g}", flush=True)
        step += 1
        if step % args.save_every == 0:
            save(args.out / f"step-{step:06d}", step, model, optimizer, scheduler)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: DataScheduler) -> None:
    """Model, optimizer and data position together; the rename makes the folder whole or not there."""
    partial = folder.with_name("partial")
    partial.mkdir(exist_ok=True)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(saved, partial / "model.pt")
    save_state(partial / "data.npz", scheduler.state_dict())
    partial.rename(folder)


if __name__ == "__main__":
    main()
