"""Tries every fused operator on this machine: how far from float64 it is, and how fast beside torch.

    for result in self_test.run("cpu"):
        print(result.kernel, result.dtype, result.error, result.allowed, result.ratio)

Each file of an operator declares a `Trial` beside its `Kernel`. `headrace doctor --kernels` prints the results.
"""

import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from parallel import accelerator
from parallel.kernels import extension
from parallel.kernels.choice import Kernel

Tensors = torch.Tensor | tuple[torch.Tensor, ...]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Largest error of any number, as a fraction of the largest number in its tensor: some roundings."""
PAIRS = 5


@dataclass(frozen=True)
class Trial:
    """Two forms of one computation, and something to compute. Both take the tensors of `inputs` and leave them alone;
    what they return is compared, and so are the gradients of floating-point inputs where there are some."""

    kernel: Kernel
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    """In float64 (int64, ...) on the CPU; torch's seed was set. They are rounded to each dtype that is tried."""
    fused: Callable[..., Tensors]
    reference: Callable[..., Tensors]


@dataclass(frozen=True)
class Result:
    """What a trial showed for one dtype."""

    kernel: str
    dtype: str
    """`float32`, `bfloat16`"""
    error: float
    """Largest error of the fused form against torch's in float64, as a fraction of the largest number in a tensor."""
    allowed: float
    ratio: float
    """Torch's time divided by the fused form's, forward and backward."""

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed


def trials() -> dict[str, Trial]:
    """Every `Trial` that a file of this folder declares, by the kernel's name, in order of names."""
    import parallel.kernels as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            for value in vars(importlib.import_module(f"parallel.kernels.{module.name}")).values():
                if isinstance(value, Trial):
                    found[value.kernel.name] = value
    return dict(sorted(found.items()))


def run(device: str) -> Iterator[Result]:
    """Each operator that is built for `device` ("cpu", "cuda"), in fp32 and bf16."""
    for trial in trials().values():
        if not any(extension.problem_on(operator, device) for operator in trial.kernel.operators):
            for dtype in ALLOWED:
                yield compare(trial, dtype, torch.device(device))


def compare(trial: Trial, dtype: torch.dtype, device: torch.device) -> Result:
    """One result. A form that fails raises what it raises."""
    torch.manual_seed(0)
    given = trial.inputs()
    rounded = [each.to(device, dtype) if each.is_floating_point() else each.to(device) for each in given]
    exact = [each.double() if each.is_floating_point() else each for each in rounded]
    mine, true = _all_results(trial.fused, rounded, dtype), _all_results(trial.reference, exact, dtype)
    errors = [_error(one, other) for one, other in zip(mine, true, strict=True)]
    pairs = [[_seconds(form, rounded, dtype) for form in (trial.reference, trial.fused)] for _ in range(PAIRS + 1)][1:]
    return Result(
        kernel=trial.kernel.name,
        dtype=str(dtype).removeprefix("torch."),
        error=max(errors, key=lambda error: (error != error, error)),  # NaN first
        allowed=ALLOWED[dtype],
        ratio=statistics.median(torchs / ours for torchs, ours in pairs),
    )


def _all_results(form: Callable[..., Tensors], inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """What the form returns, and its floating-point inputs' gradients for random gradients, rounded to `dtype`."""
    leaves = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    returned = form(*leaves)
    results = list(returned) if isinstance(returned, tuple) else [returned]
    differentiable = [each for each in results if each.requires_grad]
    if not differentiable:
        return results
    torch.manual_seed(1)
    gradients = [torch.randn(each.shape, dtype=torch.float64).to(dtype).to(each) for each in differentiable]
    floating = [each for each in leaves if each.requires_grad]
    found = torch.autograd.grad(differentiable, floating, gradients, allow_unused=True)
    return [each.detach() for each in results] + [each for each in found if each is not None]


def _error(mine: torch.Tensor, true: torch.Tensor) -> float:
    if mine.numel() == 0:
        return 0.0
    scale = max(float(true.abs().double().max()), 1e-30)
    return float((mine.double() - true.double()).abs().max()) / scale


def _seconds(form: Callable[..., Tensors], inputs: list[torch.Tensor], dtype: torch.dtype) -> float:
    accelerator.synchronize()
    start = time.perf_counter()
    _all_results(form, inputs, dtype)
    accelerator.synchronize()
    return time.perf_counter() - start
