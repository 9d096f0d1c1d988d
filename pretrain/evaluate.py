"""Held-out loss: a fixed set of sequences per source, packed as training packs them, the same for every layout.

The held-out documents are read once, when the run starts; evaluation does not touch the training stream's state.

Beside the loss per token, which depends on the tokenizer, stands the loss per byte, which does not (to be exact: the
bits per byte of arXiv 2101.00027, section 3.1). Summed are the losses of all target tokens, the end of a document among
them; divided by ln 2 and the bytes of the text those tokens stand for.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from data_scheduler.batch import RejectedRecord, Segments
from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.encoder import Encoder
from data_scheduler.lane import ExhaustedError, LaneStream, Position
from data_scheduler.manifest import Manifest
from data_scheduler.order import Int64
from data_scheduler.packers import PACKERS
from data_scheduler.packing import Carry
from data_scheduler.source import SourceReader
from data_scheduler.token_bytes import ByteCounter
from data_scheduler.unit_cache import UnitCache
from parallel import exchange
from parallel.layout import Layout
from parallel.process_groups import Ranks
from pretrain.config import RunConfig
from pretrain.loss import FIXED_POINT
from pretrain.microbatch import MicroBatch, split_batch
from pretrain.step import TrainState, evaluate_step


class HeldOut:
    """This rank's share of the held-out sequences, ready for the model."""

    def __init__(
        self,
        config: DataConfig,
        encoder: Encoder,
        count: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        multiple: int = 1,
    ) -> None:
        """Read up to `count` sequences of every source that has `val_paths`; a rank's micro-batches are a multiple of
        `multiple`. Raises ConfigError or DataError."""
        self.names = [source.name for source in config.sources]
        self.rejects: list[RejectedRecord] = []
        """Held-out records that cannot be used."""
        found = [
            (number, *sequence)
            for number, source in enumerate(config.sources)
            if source.val_paths and count
            for sequence in _first_sequences(source, config, encoder, count, self.rejects)
        ]
        self.microbatches: list[MicroBatch] = []
        self.bits_per_nat_per_token: dict[str, float] = {}
        """Of each source target tokens over (ln 2 · bytes of their text); of all ranks' sequences, the same on each."""
        if not found:
            return
        self.bits_per_nat_per_token = _factors(found, self.names, encoder)
        # Every rank runs the same number of micro-batches, or pipelines would wait for ever; the last are padded with
        # copies whose tokens do not count.
        group = dp_size * micro_batch_size * multiple
        padded = found + [found[0]] * (-len(found) % group)
        own = range(dp_rank, len(padded), dp_size)
        self.microbatches = split_batch(
            np.stack([padded[index][1] for index in own]),
            [padded[index][2].starts for index in own],
            np.array([padded[index][0] for index in own], dtype=np.int64),
            micro_batch_size,
            [padded[index][2].weights for index in own],
        )
        for at, index in enumerate(own):
            if index >= len(found):
                self._mute(at, micro_batch_size)

    def losses(self, state: TrainState) -> dict[str, float]:
        """Mean loss per held-out token of each source, in nats; the same on every rank."""
        if not self.microbatches:
            return {}
        sums, tokens = evaluate_step(state, self.microbatches)
        return {
            name: int(sums[number]) / FIXED_POINT / int(tokens[number])
            for number, name in enumerate(self.names)
            if tokens[number]
        }

    def bits_per_byte(self, losses: dict[str, float]) -> dict[str, float]:
        """What `losses` are per byte of text, in bits; a source whose target tokens stand for no text is left out."""
        factors = self.bits_per_nat_per_token
        return {name: loss * factors[name] for name, loss in losses.items() if name in factors}

    def _mute(self, row: int, micro_batch_size: int) -> None:
        index, place = divmod(row, micro_batch_size)
        microbatch = self.microbatches[index]
        mask = microbatch.loss_mask.clone().view(micro_batch_size, -1)
        mask[place] = False
        self.microbatches[index] = replace(microbatch, loss_mask=torch.reshape(mask, microbatch.loss_mask.shape))


def _factors(found: list[tuple[int, Int64, Segments]], names: list[str], encoder: Encoder) -> dict[str, float]:
    counter = ByteCounter(encoder)
    tokens, text = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    for number, row, segments in found:
        # Which tokens count is asked of what the model gets, so that both never differ.
        (one,) = split_batch(row[None], [segments.starts], np.array([number]), 1, [segments.weights])
        counted = np.append(False, one.loss_mask.numpy())
        tokens[number] += counted.sum()
        text[number] += counter.count(row, counted)
    return {name: tokens[n] / (math.log(2) * text[n]) for n, name in enumerate(names) if text[n]}


def read_held_out(
    config: RunConfig, layout: Layout, ranks: Ranks, encoder: Encoder, say: Callable[[str], None]
) -> HeldOut:
    """What a run evaluates on; every rank calls this, and `say` hears of records that were left out."""
    count, size = config.train.eval_sequences, config.train.micro_batch_size
    # What the interleaved schedule takes; training's micro-batches are checked with the layout.
    multiple = layout.pipeline_parallel_size if layout.model_chunks > 1 else 1
    held_out = exchange.agree(
        lambda: HeldOut(config.data, encoder, count, size, ranks.dp_rank, ranks.dp_size, multiple)
    )
    for reject in held_out.rejects:
        say(f"held-out data of {reject.source}: {reject.file}, record {reject.record}: {reject.reason}")
    return held_out


def _first_sequences(
    source: SourceConfig, config: DataConfig, encoder: Encoder, count: int, rejects: list[RejectedRecord]
) -> list[tuple[Int64, Segments]]:
    """The first `count` sequences of one pass over the source's held-out files; fewer when they hold less, none when
    they hold nothing of a band."""
    # Of the transforms those that change how the data is spelled are left out, and all documents are causal: held-out
    # losses stay comparable.
    kept = [transform for transform in source.transforms if transform.kind not in ("fim", "bpe_dropout")]
    changes = {"paths": source.val_paths, "val_paths": [], "max_epochs": 1, "transforms": kept, "objectives": []}
    held_out = source.model_copy(update=changes)
    single_lane = config.model_copy(update={"lanes": 1})
    reader = SourceReader(held_out, Manifest.take(held_out), single_lane, encoder, UnitCache())
    packer = PACKERS[config.packing](LaneStream(reader, 0, Position()), Carry())
    sequences: list[tuple[Int64, Segments]] = []
    try:
        while len(sequences) < count:
            row = np.empty(config.seq_len + 1, dtype=np.int64)
            sequences.append((row, packer.pack(row)))
    except ExhaustedError:
        if not sequences and source.band and not any(len(reader.records(n)[1]) for n in range(len(reader.chunks))):
            return []  # the held-out files hold nothing of this band
        if not sequences:  # less than one sequence in all: go round until it is full
            reader.max_epochs = None
            sequences.append((row, PACKERS["split"](LaneStream(reader, 0, Position()), Carry()).pack(row)))
    rejects += reader.rejects
    return sequences
