"""What tests of fused operators have in common: gradients, special values, independence of threads."""

from collections.abc import Callable, Sequence

import torch

Form = Callable[..., torch.Tensor]
INF, NAN = float("inf"), float("nan")
SPECIAL = (NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 100.0, -100.0, 3e38, -3e38, 1e-38)


def gradients(form: Form, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """What `form` gives for `inputs`, then the gradient of each of them."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    out = form(*leaves)
    out.backward(grad)
    found = [out.detach()]
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found


def assert_same_specials(mine: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    """NaN and infinities stand at the same places, the latter with the same sign."""
    for one, two in zip(mine, other, strict=True):
        assert torch.equal(one.isnan(), two.isnan())
        assert torch.equal(one.isinf(), two.isinf())
        assert torch.equal(one[one.isinf()], two[two.isinf()])


def with_threads(count: int, call: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What `call` gives when torch has `count` threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return call()
    finally:
        torch.set_num_threads(before)


def every_finite_bfloat16() -> torch.Tensor:
    """bfloat16[65280]."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return numbers[numbers.isfinite()]
