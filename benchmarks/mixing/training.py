"""One run of the trainer itself, `headrace train` without the command: a configuration in, what it learned out.

Runs follow one another in forked children of one process, so that megatron is imported once (20 CPU-seconds) and no run
leaves anything to the next.
"""

import gc
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from data_scheduler import Journal
from parallel import process_groups
from pretrain.config import validate_config
from pretrain.evaluate import HeldOut
from pretrain.loop import Run
from pretrain.metrics import read_records
from pretrain.recovery.watchdog import Watchdog
from pretrain.step import TrainState, place
from pretrain.train import layout_of

MIXTURES_KEPT = 12
"""Mixtures of a run that its result shows at most."""


def train_once(raw: dict[str, Any], folder: Path, judged: int, accuracy: bool = False) -> dict[str, Any]:
    """Train as `raw` says, in a child and in `folder`, which is removed afterwards. What is known of the run then:

    `val_loss` and, if asked for, `accuracy` of each source after the last step, on `judged` held-out sequences of each;
    `curve`: [step, losses] of every evaluation, on `train.eval_sequences` of them, which is what policies see;
    `shares`: what was drawn of each source over the run; `mixtures`: [step, shares asked for]; `tokens`, `parameters`,
    `cpu_s`. Raises RuntimeError with the end of the child's output when it fails.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, answer = folder / "log.txt", folder / "result.json"
    sys.stdout.flush()
    gc.collect()
    gc.freeze()
    child = os.fork()
    if not child:
        code = 1
        try:
            _to_file(log)
            answer.write_text(json.dumps(_trained({**raw, "run": {"dir": str(folder / "run")}}, judged, accuracy)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a run ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text())
    shutil.rmtree(folder)
    return found


def _to_file(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def _trained(raw: dict[str, Any], judged: int, accuracy: bool) -> dict[str, Any]:
    config = validate_config(raw, "benchmark")
    began, clock = time.process_time(), time.perf_counter()
    torch.set_num_threads(1)
    layout = layout_of(config, 1)
    ranks = process_groups.initialize(layout, config.train.seed)
    with Watchdog(config.recovery.watchdog_s, Path(config.run.dir) / "log", ranks.rank) as watchdog:
        run = Run(config, layout, ranks, watchdog)
        code = run.go()
        if code:
            raise RuntimeError(f"the run left with {code}")
        found = _told(Path(config.run.dir))
        judge = HeldOut(config.data, run.scheduler.encoder, judged, config.train.micro_batch_size, 0, 1)
        found["val_loss"] = {name: round(loss, 5) for name, loss in judge.losses(run.state).items()}
        if accuracy:
            found["accuracy"] = answered(run.state, judge)
    spent = {"cpu_s": round(time.process_time() - began, 1), "wall_s": round(time.perf_counter() - clock, 1)}
    return {**found, "parameters": sum(p.numel() for chunk in run.state.chunks for p in chunk.parameters()), **spent}


def _told(run: Path) -> dict[str, Any]:
    """What a run's own files say."""
    curve, tokens = [], dict[str, int]()
    for record in read_records(run / "metrics.jsonl"):
        if isinstance(record.get("val_loss"), dict):
            curve.append([record["step"], {name: round(x, 5) for name, x in record["val_loss"].items()}])
        for name, count in record.get("source_tokens", {}).items():
            tokens[name] = tokens.get(name, 0) + int(count)
    events = Journal(run / "journal.jsonl", writable=False).of("mixture")
    every = -(-len(events) // MIXTURES_KEPT) or 1
    mixtures = [[e.step, {name: round(x, 4) for name, x in e.data["weights"].items()}] for e in events[::every]]
    total = sum(tokens.values())
    return {
        "curve": curve,
        "tokens": total,
        "shares": {name: round(count / total, 4) for name, count in sorted(tokens.items())},
        "mixtures": mixtures,
    }


@torch.no_grad()
def answered(state: TrainState, held_out: HeldOut) -> dict[str, float]:
    """Part of each source's held-out tokens with a loss that the model gives the highest probability."""
    right, asked = torch.zeros(2, state.num_sources, dtype=torch.int64)
    for microbatch in held_out.microbatches:
        batch = place(microbatch, state)
        counted = batch.loss_mask[0]
        right.index_add_(0, batch.source_ids, ((_predictions(state, batch) == batch.labels[0]) & counted).long())
        asked.index_add_(0, batch.source_ids, counted.long())
    return {
        name: round(int(right[number]) / int(asked[number]), 5)
        for number, name in enumerate(held_out.names)
        if asked[number]
    }


def _predictions(state: TrainState, batch: Any) -> torch.Tensor:
    """int64[tokens]: the likeliest next token at every place."""
    model = state.chunks[0]
    model.eval()
    logits = model(batch.input_ids, batch.position_ids, None, packed_seq_params=batch.documents)
    return logits.reshape(-1, logits.size(-1)).argmax(dim=1)
