"""How much faster our kernels are than torch in eager mode, on this machine: ratios, printed and written as JSON.

    python benchmarks/kernels.py --threads 1

Both forms run alternately, so that other work on the machine slows both; a ratio is the median over pairs of runs that
follow each other, torch's time divided by ours. `gpu` in the result is null where no GPU was at hand.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loading.result import circumstances, result_options, write_result

from headrace.errors import HeadraceError
from parallel import accelerator
from parallel.kernels import swiglu

RESULT = Path(__file__).parent / "results" / "kernels.json"
# (tokens of a micro-batch, width of the MLP): quickstart's, a 125M model's at 2,048 tokens, and a 1B model's at 4,096.
SHAPES = ((8 * 256, 704), (2048, 2048), (4096, 5632))
PAIRS = 15


def swiglu_times(
    form: Callable[[torch.Tensor], torch.Tensor], gate_up: torch.Tensor, grad: torch.Tensor
) -> list[float]:
    """Seconds of [forward, backward]."""
    gate_up.grad = None
    accelerator.synchronize()
    start = time.perf_counter()
    hidden = form(gate_up)
    accelerator.synchronize()
    middle = time.perf_counter()
    hidden.backward(grad)
    accelerator.synchronize()
    return [middle - start, time.perf_counter() - middle]


def measure_swiglu(tokens: int, width: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One record for each pass."""
    torch.manual_seed(0)
    device = accelerator.device()
    gate_up = torch.randn(tokens, 2 * width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, width, device=device, dtype=dtype)
    forms = (swiglu.reference, swiglu.fused)
    for form in forms:
        swiglu_times(form, gate_up, grad)
    pairs = [[swiglu_times(form, gate_up, grad) for form in forms] for _ in range(PAIRS)]
    records = []
    for at, name in enumerate(("forward", "backward")):
        torchs, ours = ([pair[form][at] for pair in pairs] for form in (0, 1))
        numbers = {"forward": 3, "backward": 5}[name] * tokens * width
        records.append(
            {
                "op": "swiglu",
                "pass": name,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "width": width,
                "torch_ms": round(statistics.median(torchs) * 1e3, 3),
                "fused_ms": round(statistics.median(ours) * 1e3, 3),
                "ratio": round(statistics.median(t / o for t, o in zip(torchs, ours, strict=True)), 2),
                "fused_gb_per_s": round(numbers * dtype.itemsize / statistics.median(ours) / 1e9, 2),
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)"
    )
    result_options(parser, RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = "gpu" if accelerator.has_gpu() else "cpu"
    try:
        swiglu.choose("fused", accelerator.device().type)
    except HeadraceError as error:
        sys.exit(str(error))
    records = []
    for tokens, width in SHAPES:
        for dtype in swiglu.DTYPES:
            for record in measure_swiglu(tokens, width, dtype):
                print("  ".join(f"{value:>9}" for value in record.values()), flush=True)
                records.append(record)
    # A GPU's result is added to a CPU's and the other way round.
    result = json.loads(options.out.read_text()) if options.out.exists() else {"cpu": None, "gpu": None}
    facts = circumstances("kernels.py")
    facts["machine"] |= accelerator.describe() | {"torch": torch.__version__}
    result[kind] = {**facts, "results": records}
    write_result(options.out, result)


if __name__ == "__main__":
    main()
