"""Loads `_C.abi3.so`, the library of operators built from `csrc/` by `setup.py`, into torch."""

import functools
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
HOW_TO_BUILD = "pip install --no-build-isolation -e . where torch and g++ are installed"


@functools.cache
def problem() -> str:
    """Why the operators `torch.ops.headrace.*` are not there; "" when they are. Loads the library the first time."""
    libraries = sorted(FOLDER.glob("_C*.so"))
    if not libraries:
        return f"not built; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(libraries[-1])  # type: ignore[no-untyped-call]
    except OSError as error:  # built for another processor, or a torch older than 2.11
        return f"{libraries[-1].name} does not load into torch {torch.__version__}: {error}"
    return ""


def has(*operators: str) -> bool:
    """Whether the library is there and knows all of `operators`; one that was built earlier may not."""
    return not problem() and all(torch._C._dispatch_has_kernel(f"headrace::{each}") for each in operators)


def problem_on(operator: str, device: str) -> str:
    """Why `torch.ops.headrace.<operator>` cannot run on `device` ("cpu" or "cuda"); "" when it can."""
    if problem():
        return problem()
    if not torch._C._dispatch_has_kernel(f"headrace::{operator}"):
        return f"the library that was built is older than {operator}; {HOW_TO_BUILD}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"headrace::{operator}", device.upper()):
        return ""
    return f"built without {device.upper()} kernels; HEADRACE_CUDA=1 {HOW_TO_BUILD}, with nvcc"
