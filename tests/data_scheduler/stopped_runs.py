"""Runs with special tokens that are stopped and go on with other numbers of ranks; what they must not change."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from data_scheduler import DataConfig, Scheduler, batch_sha256, merge_states
from data_scheduler.encoder import Encoder

STEPS, BATCH = 8, 6


def save_tokenizer(corpus: Path, specials: Sequence[str], folder: Path) -> str:
    """Path of the corpus's tokenizer with more special tokens."""
    made = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    made.add_special_tokens(list(specials))
    path = folder / "tokenizer.json"
    made.save(str(path))
    return str(path)


def hashes(
    make: Callable[..., DataConfig], encoder: Encoder, parts: Sequence[tuple[int, int, int]], run_dir: Path
) -> list[str]:
    """The hashes of eight steps of six sequences that are given in `parts`: (steps, data-parallel size, prefetch)."""
    found: list[str] = []
    state = None
    for steps, dp, prefetch in [*parts, (STEPS, 1, 0)]:
        config = make(prefetch=prefetch)
        ranks = [Scheduler(config, dp_rank=rank, dp_size=dp, run_dir=run_dir, encoder=encoder) for rank in range(dp)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(min(steps, STEPS - len(found))):
            digests: dict[int, bytes] = {}
            for rank in ranks:
                batch = next(rank)
                digests.update(zip(batch.slots.tolist(), batch.digests, strict=True))
            found.append(batch_sha256([digests[slot] for slot in range(BATCH)]))
        state = merge_states([rank.state_dict() for rank in ranks])
        for rank in ranks:
            rank.close()
    return found
