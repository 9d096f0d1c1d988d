"""Which form of an operator computes on a device: torch's, or the fused one of `csrc/`; and why.

from parallel.kernels import choice, swiglu
choice.choose(swiglu.KERNEL, "auto", "cpu")     # ("fused", "faster than torch on cpu")
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal

from headrace.errors import ConfigError
from parallel.kernels import extension

Choice = Literal["auto", "torch", "fused"]
Implementation = Literal["torch", "fused"]


@dataclass(frozen=True)
class Kernel:
    """What there is to choose from for one key under `kernels:`."""

    name: str
    """The key: `swiglu`."""
    operators: tuple[str, ...]
    """The library's operators that the fused form calls: `swiglu_forward` for `torch.ops.headrace.swiglu_forward`."""
    faster_on: frozenset[str]
    """Devices ("cpu", "cuda") where `benchmarks/kernels.py` measured the fused form to be faster; `auto` takes it
    there."""


def choose(kernel: Kernel, choice: Choice, device: str) -> tuple[Implementation, str]:
    """(form to use on `device` ("cpu" or "cuda"), why). Raises ConfigError when `fused` is asked for and not there."""
    if choice == "torch":
        return "torch", "asked for"
    problem = next(filter(None, (extension.problem_on(each, device) for each in kernel.operators)), "")
    if choice == "fused":
        if problem:
            raise ConfigError(
                f"kernels.{kernel.name}: fused is not available on {device}: {problem}; or set it to auto"
            )
        return "fused", "asked for"
    if problem:
        return "torch", problem
    if device not in kernel.faster_on:
        why = f"the fused kernel is there, but was not measured on {device} yet; kernels.{kernel.name}=fused uses it"
        return "torch", why
    return "fused", f"faster than torch on {device}"


def kernels() -> dict[str, Kernel]:
    """Every `Kernel` that a file of this folder declares, by name, in order of names."""
    import parallel.kernels as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue  # the compiled library
        for value in vars(importlib.import_module(f"parallel.kernels.{module.name}")).values():
            if isinstance(value, Kernel):
                found[value.name] = value
    return dict(sorted(found.items()))


def available(device: str) -> dict[str, str]:
    """For each operator what `auto` uses on `device` ("cpu", "cuda") and why.

    For example `{"swiglu": "fused: faster than torch on cpu"}`.
    """
    return {name: ": ".join(choose(kernel, "auto", device)) for name, kernel in kernels().items()}
