"""One measurement of an operator: torch's form and ours, on the same tensors, and what an ideal kernel would move."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from parallel.kernels.choice import Kernel

Call = Callable[[], object]
"""One run of the pass that is measured. It may be called any number of times; what it returns is dropped."""


@dataclass(frozen=True)
class Forms:
    """The same computation, by everybody who can do it; each on its own copy of what it changes in place."""

    torch: Call
    ours: Call
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    """Name of a library → what makes its form. That raises ImportError, in one line, where it is not installed."""


@dataclass(frozen=True)
class Case:
    """`build` is called with the device, after torch's seed was set, and may be called several times: on a GPU calls go
    round as many copies as do not fit into its cache."""

    kernel: Kernel
    part: str
    """`forward`, `backward` or `step`."""
    shape: str
    """For people: `4096 tokens x 5632`."""
    dtype: torch.dtype
    bytes_moved: int
    """Bytes that a kernel must at least read and write for one call."""
    target: float
    """Fraction of the bandwidth of a copy of as many bytes to reach on a GPU."""
    build: Callable[[torch.device], Forms]


def backward_of(
    form: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, *others: object
) -> Call:
    """The backward pass alone of `form(*inputs, *others)`: gradients of `inputs` for the gradient `grad` of its result.

    The forward pass runs once, here; `grad` is not changed.
    """
    leaves = tuple(each.detach().requires_grad_() for each in inputs)
    result = form(*leaves, *others)
    return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)


def compiled(form: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`form` by torch.compile; the peer `torch.compile`. Raises ImportError where there is nothing to compile with."""
    if torch.accelerator.is_available():
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise ImportError("triton is not installed") from error
    return torch.compile(form, dynamic=False)
