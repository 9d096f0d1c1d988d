"""Training speed of one process, beside a plain PyTorch loop and Hugging Face `Trainer` on the same model.

    python benchmarks/train_throughput.py                    CPU: 16 M parameters, fp32, one thread per process
    python benchmarks/train_throughput.py --device gpu       1B and 3B llama shapes, bf16, 4,096 tokens, one GPU

All arms start from the same weights and see the same packed sequences; the first losses of ours, the plain loop and
`hf` must agree to 1e-4, or nothing is written. They take turns, forwards and backwards (A B C C B A), so a change of
load meets all alike. Ratios are of tokens per CPU second, whose spread over the rounds is given; on a quiet machine
those of wall time are the same.

The scaling run is our own arm with 1 and with 2 processes (data parallel over gloo) on the same global batch.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.loading.result import circumstances, result_options, versions, write_result  # noqa: E402
from benchmarks.training.settings import QUICK, Settings  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "train_throughput.json"
ARMS = ("ours", "plain", "hf", "hf_whole_rows")
SAME_LOSS = ("ours", "plain", "hf")
TOLERANCE = 1e-4


class Arm:
    """A child process that trains when it is told to."""

    def __init__(
        self, name: str, settings: Settings, weights: Path, rank: int = 0, world: int = 1, port: int = 0
    ) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"
        }  # fmt: skip
        if name == "ours":  # the others would wrap the model for several processes, to their cost
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()),
            }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "benchmarks.training.child",
            name,
            json.dumps(settings._asdict()),
            str(weights),
        ]
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"arm {self.name} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def order(self, steps: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def train(self, steps: int) -> dict[str, Any]:
        self.order(steps)
        return self.answer()

    def end(self) -> None:
        self.order(0)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def rates(settings: Settings, steps: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = steps * settings.tokens_per_step
    return {
        f"tokens_per_{clock}": summary([tokens / one[key] for one in rounds])
        for clock, key in (("cpu_s", "cpu_s"), ("s", "wall_s"))
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(settings: Settings, steps: int, rounds: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Every arm's speed, and ours over each peer's, round by round."""
    with tempfile.TemporaryDirectory(prefix="train_throughput") as folder:
        weights = Path(folder) / "weights.pt"
        arms = [Arm(name, settings, weights) for name in names]
        for arm in arms:  # ours first: it writes the weights that the others wait for
            if arm.name != "ours":
                arm.order(0)
            facts = arm.answer()
        first = {arm.name: arm.train(5)["losses"] for arm in arms}  # also the warm-up
        check_losses(first)
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                times[arm.name].append(arm.train(steps))
        for arm in arms:
            arm.end()
    result: dict[str, Any] = {"parameters": facts["parameters"], "first_losses": first, "arms": {}, "ours_over": {}}
    for name in names:
        result["arms"][name] = rates(settings, steps, times[name])
        if name != "ours":
            result["ours_over"][name] = {
                clock: summary([peer[key] / own[key] for own, peer in zip(times["ours"], times[name], strict=True)])
                for clock, key in (("cpu", "cpu_s"), ("wall", "wall_s"))
            }
    return result


def check_losses(first: dict[str, list[float]]) -> None:
    for name in SAME_LOSS:
        for step, (ours, theirs) in enumerate(zip(first["ours"], first.get(name, first["ours"]), strict=True)):
            if abs(ours - theirs) > TOLERANCE * ours:
                raise SystemExit(f"step {step}: loss {ours} here and {theirs} in {name}: not the same model")


def scale(settings: Settings, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of our arm with 1 and 2 processes on the same global batch; losses must be the same."""
    result, losses = {}, {}
    with tempfile.TemporaryDirectory(prefix="train_throughput") as folder:
        for world in (1, 2):
            port = free_port()
            arms = [Arm("ours", settings, Path(folder) / "weights.pt", rank, world, port) for rank in range(world)]
            for arm in arms:
                arm.answer()
            times = []
            for number in range(rounds + 1):
                for arm in arms:
                    arm.order(steps if number else 5)
                answers = [arm.answer() for arm in arms]
                if number:
                    times.append(max(answer["wall_s"] for answer in answers))
                else:
                    losses[world] = answers[0]["losses"]
            for arm in arms:
                arm.order(0)
            for arm in arms:
                arm.process.wait()
            result[str(world)] = summary([steps * settings.tokens_per_step / time for time in times])
    if any(abs(a - b) > TOLERANCE * a for a, b in zip(losses[1], losses[2], strict=True)):
        raise SystemExit(f"1 process has losses {losses[1]}, 2 have {losses[2]}")
    return {"tokens_per_s": result, "speedup": result["2"]["median"] / result["1"]["median"]}


def report(result: dict[str, Any]) -> str:
    lines = []
    cpu = result.get("cpu")
    if cpu:
        lines.append(f"{cpu['parameters'] / 1e6:.1f} M parameters, fp32, one thread")
        for name, arm in cpu["arms"].items():
            rate = arm["tokens_per_cpu_s"]
            lines.append(
                f"  {name:<14}{rate['median']:>9,.0f} tokens/CPU s  ({rate['min']:,.0f} to {rate['max']:,.0f})"
            )
        for name, ratio in cpu["ours_over"].items():
            one, wall = ratio["cpu"], ratio["wall"]["median"]
            lines.append(
                f"  ours / {name:<14}{one['median']:.3f} of CPU time ({one['min']:.3f} to {one['max']:.3f}), "
                f"{wall:.3f} of wall time"
            )
        lines.append(f"  2 processes over 1: {cpu['scaling']['speedup']:.2f} times the tokens per second")
    gpu = result.get("gpu")
    if isinstance(gpu, str):
        lines.append(f"GPU: {gpu}")
    elif gpu:
        lines += [f"GPU: {json.dumps(row)}" for row in gpu]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: does it run?")
    parser.add_argument("--rounds", type=int, default=None, help="turns of every arm (default 8)")
    parser.add_argument("--steps", type=int, default=None, help="steps of a turn (default 4)")
    parser.add_argument("--arms", default=",".join(ARMS), help="which arms, ours first")
    result_options(parser, RESULT)
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    rounds = options.rounds or (2 if options.quick else 8)
    steps = options.steps or (2 if options.quick else 4)
    names = ["torch", "megatron-core", "transformers", "accelerate", "numpy"]
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    result = circumstances("train_throughput.py") | {"versions": versions(names)}
    if options.device == "cpu":
        cpu = compare(settings, steps, rounds, tuple(options.arms.split(",")))
        cpu |= {"scaling": scale(settings, steps, max(2, rounds // 2)), "settings": settings._asdict()}
        result |= {"rounds": rounds, "steps": steps, "cpu": cpu}
        result["gpu"] = before.get("gpu", "not measured: no GPU was at hand")
    else:
        from benchmarks.training.gpu import measure

        result = {**before, **result, "gpu": measure(quick=options.quick)}
    write_result(options.out, result)
    print(report(result))


if __name__ == "__main__":
    main()
