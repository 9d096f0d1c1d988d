"""What the loss guard finds and what it costs: runs in which something goes wrong at a known step, and clean ones.

    python benchmarks/loss_guard.py --work DIR --seeds 5

Small runs on the CPU under `recovery.loss_guard.policy: rollback`, its other settings the defaults. In each but the
clean ones one thing is done to it, at a random step of its second half:

poisoned documents    half of the sequences of one batch are random tokens, whenever that batch is trained
flipped bit           once, on one of two ranks: one of the four highest exponent bits of one gradient of that rank
bad learning rate     300 times the learning rate for three steps, whenever these steps are trained

An anomaly counts as found within REACH steps of what was done, and as a false alarm otherwise. precision: found over
all anomalies that were told; recall: runs in which it was found over runs in which something was done; attribution:
runs in which the guard's finding (data or optimisation; hardware) is right over runs in which it was found. tokens
lost: those of steps that were done again, and of steps whose update was left out.
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from loading.result import circumstances, result_options, versions, write_result

from data_scheduler import Journal
from pretrain import loop, run_folder
from pretrain import step as step_module
from pretrain.config import RunConfig, validate_config
from pretrain.train import train

RESULT = Path(__file__).parent / "results" / "loss_guard.json"
KINDS = ("clean", "poisoned documents", "flipped bit", "bad learning rate")
TRUE_CAUSE = {
    "poisoned documents": "data or optimisation",
    "bad learning rate": "data or optimisation",
    "flipped bit": "not reproduced: hardware, most likely",
}
STEPS, BATCH, SEQ_LEN, EVERY = 160, 16, 64, 20
TOKENS = BATCH * SEQ_LEN
"""Of a step."""
REACH = 8
"""Steps from what was done to its anomaly at most; weights that a bad learning rate has spoilt show at once."""
BAD_LR, BAD_STEPS = 300.0, 3
WORDS = ["river", "mill", "wheel", "water", "stone", "grain", "flour", "weir", "sluice", "timber", "iron", "gear"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_options(parser, RESULT)
    parser.add_argument("--work", type=Path, help="folder for the runs (default: one that is removed afterwards)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = words.work or Path(folder)
        make_corpus(work / "corpus")
        runs = [one_run(kind, seed, words.steps, work) for kind in KINDS for seed in range(words.seeds)]
    result = {
        **circumstances("loss_guard.py"),
        "versions": versions(["torch", "megatron-core"]),
        "settings": {"steps": words.steps, "tokens_per_step": TOKENS, "checkpoint_every": EVERY, "seeds": words.seeds},
        "summary": summary(runs),
        "runs": runs,
    }
    write_result(words.out, result)


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs say together; `runs` as `judged` makes them."""
    done = [run for run in runs if run["kind"] != "clean"]
    found = [run for run in done if run["found"]]
    anomalies = sum(len(run["anomalies"]) for run in runs)
    alarms = sum(run["false_alarms"] for run in runs)
    by_kind = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own = [run for run in runs if run["kind"] == kind]
        lost = [run["tokens_lost"] for run in own]
        by_kind[kind] = {
            "runs": len(own),
            "found": sum(bool(run["found"]) for run in own),
            "attributed": sum(run["cause"] == TRUE_CAUSE.get(kind) for run in own if run["found"]),
            "false_alarms": sum(run["false_alarms"] for run in own),
            "ended": sum(run["exit_code"] == 0 for run in own),
            "tokens_lost_median": statistics.median(lost),
            "tokens_lost_most": max(lost),
        }
    return {
        "precision": round(1 - alarms / anomalies, 4) if anomalies else None,
        "recall": round(len(found) / len(done), 4) if done else None,
        "attribution": round(sum(run["cause"] == TRUE_CAUSE[run["kind"]] for run in found) / len(found), 4)
        if found
        else None,
        "steps_judged": sum(run["steps"] for run in runs),
        "false_alarms": alarms,
        "by_kind": by_kind,
    }


def judged(
    kind: str, at: int | None, steps: int, exit_code: int, events: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run's journal says of it; `events`: the data of its `rollback` and `anomaly` events, in order."""
    anomalies = sorted({event["anomaly"] for event in events})
    near = [step for step in anomalies if at is not None and at <= step <= at + REACH]
    last = [event["cause"] for event in events if event["anomaly"] in near and event["cause"] != "unknown"]
    again = sum(event["anomaly"] + 1 - event["to"] for event in events if event.get("to", -1) >= 0)
    windows = [event["passed_over"] for event in events if event.get("passed_over")]
    left_out = len({step for first, end in windows for step in range(first, end + 1)})
    return {
        "kind": kind,
        "at": at,
        "steps": steps,
        "exit_code": exit_code,
        "anomalies": anomalies,
        "found": bool(near),
        "false_alarms": len(anomalies) - len(near),
        "cause": last[0] if last else None,
        "tokens_lost": (again + left_out) * TOKENS,
    }


def one_run(kind: str, seed: int, steps: int, work: Path) -> dict[str, Any]:
    """A run in processes of its own, and what its journal says."""
    chance = random.Random(f"{kind} {seed}")
    at = None if kind == "clean" else chance.randrange(steps // 2, steps - 2 * REACH)
    folder = work / f"{kind.replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    config = run_config(folder, work / "corpus", seed, steps)
    world_size = 2 if kind == "flipped bit" else 1
    codes = in_processes(world_size, lambda: train_wrongly(config, kind, at, seed, folder), work / f"{folder.name}.log")
    journal = Journal(folder / "journal.jsonl", writable=False)
    events = [event.data for event in journal.events if event.kind in ("rollback", "anomaly")]
    return judged(kind, at, steps, max(codes, key=abs), events) | {"seed": seed}


def train_wrongly(config: RunConfig, kind: str, at: int | None, seed: int, folder: Path) -> int:
    """Train, with what `kind` says done at step `at`."""
    if kind == "poisoned documents":
        _poison(at, seed)
    elif kind == "flipped bit":
        _flip(at, seed, folder / "flipped")
    elif kind == "bad learning rate":
        usual = loop.learning_rate

        def too_high(config: RunConfig, shape: Any, step: int) -> float:
            return usual(config, shape, step) * (BAD_LR if at is not None and at <= step < at + BAD_STEPS else 1.0)

        loop.learning_rate = too_high
    return int(train(config))


def _poison(at: int | None, seed: int) -> None:
    class Poisoned(run_folder.Scheduler):
        def __next__(self) -> Any:
            batch = super().__next__()
            if batch.step == at:
                generator = torch.Generator().manual_seed(seed)
                half = batch.tokens[: len(batch.tokens) // 2]
                half[:] = torch.randint(0, self.encoder.vocab_size, half.shape, generator=generator).numpy()
            return batch

    run_folder.Scheduler = Poisoned


def _flip(at: int | None, seed: int, marker: Path) -> None:
    original, chance = step_module.update, random.Random(seed)
    bit = chance.choice((27, 28, 29, 30))

    def flipped(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        step = args[4].func.__self__._step  # `allows` is a partial of the guard's
        if step == at and os.environ.get("RANK") == "1" and not marker.exists():
            marker.touch()
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            words = chance.choice(parameters).main_grad.view(-1).view(torch.int32)
            words[chance.randrange(len(words))] ^= 1 << bit
        return original(optimizer, *args, **kwargs)

    step_module.update = flipped


def run_config(folder: Path, corpus: Path, seed: int, steps: int) -> RunConfig:
    """A small model; the guard as it is by default, but for its policy."""
    model = {"family": "llama", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
    return validate_config(
        {
            "run": {"dir": str(folder)},
            "model": model | {"num_query_groups": 2, "tie_embeddings": True},
            "data": {
                "tokenizer": str(corpus / "tokenizer.json"),
                "sources": [{"name": "text", "paths": [str(corpus / "text.jsonl")]}],
                "seq_len": SEQ_LEN,
                "global_batch_size": BATCH,
                "lanes": BATCH,
                "seed": seed,
            },
            "train": {"steps": steps, "micro_batch_size": 4, "eval_sequences": 0, "threads": 1, "seed": seed},
            "optimizer": {"lr": 3e-3, "warmup_steps": 10},
            "checkpoint": {"every": EVERY},
            "recovery": {"loss_guard": {"policy": "rollback"}},
            "metrics": {"progress": False},
        },
        "loss_guard.py",
    )


def make_corpus(folder: Path) -> None:
    """A text of which a small model learns something in a hundred steps, and a tokenizer of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)

    def sentence() -> Iterator[str]:
        word = chance.choice(WORDS)
        for _ in range(chance.randint(20, 200)):
            yield word  # each word has four that may follow
            word = WORDS[(WORDS.index(word) * 5 + chance.randint(1, 4)) % len(WORDS)]

    texts = [" ".join(sentence()) for _ in range(4000)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts[:200], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def in_processes(world_size: int, act: Callable[[], int], log: Path) -> list[int]:
    """Exit codes of `world_size` forks of this process, in which torch and megatron are imported already."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    sys.stdout.flush()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            _in_child(act, log)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _in_child(act: Callable[[], int], log: Path) -> None:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = act()
    except Exception as error:
        code = int(getattr(error, "exit_code", 1))
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
