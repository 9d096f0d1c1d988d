"""The head: its loss on logits that are there, and the whole of it with its matrix products. Peers: torch.compile,
Liger's fused linear cross entropy, cut-cross-entropy.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernel_cases.case import Call, Case, Forms, compiled
from parallel.kernels import head
from parallel.kernels.linear_cross_entropy import Head, linear_cross_entropy, reference

# (tokens, width, vocabulary): small enough for a CPU, where the products take most of the time.
SHAPES = ((512, 256, 32_000), (256, 128, 139_776))
Z_LOSS = 1e-4


def cases() -> Iterator[Case]:
    for tokens, width, vocabulary in SHAPES:
        for dtype in head.DTYPES:
            logits, weights = tokens * vocabulary * dtype.itemsize, vocabulary * width
            yield Case(
                kernel=head.KERNEL,
                part="step",
                shape=f"loss of {tokens} tokens x {vocabulary}",
                dtype=dtype,
                bytes_moved=2 * logits,
                target=0.80,
                build=partial(_loss, tokens, vocabulary, dtype),
            )
            yield Case(
                kernel=head.KERNEL,
                part="step",
                shape=f"{tokens} tokens x {width} x {vocabulary}",
                dtype=dtype,
                # The loss's; the three products' reading and writing of logits; weight twice and its fp32 gradient.
                bytes_moved=5 * logits + weights * (2 * dtype.itemsize + 8),
                target=0.0,  # bound by its products: at most 1.10 times the time of these three
                build=partial(_whole, tokens, width, vocabulary, dtype),
            )


def _loss(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Forms:
    """Losses and the logits' gradient; both forms begin with a copy of the logits, which ours overwrites."""
    from pretrain.loss import vocab_parallel_cross_entropy

    logits = (torch.randn(tokens, vocabulary, device=device) * 3).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    weights, sources = torch.ones(tokens, device=device), torch.zeros(tokens, dtype=torch.int64, device=device)
    counters = torch.zeros(1, len(head.COUNTERS), dtype=torch.int64, device=device)

    def torchs() -> object:
        leaf = logits.clone().requires_grad_()
        # fp32 logits are overwritten, so not the leaf
        scores = leaf.view_as(leaf) if dtype != torch.float32 else _Overwritable.apply(leaf)
        minimised = vocab_parallel_cross_entropy(scores, labels, _OneRank(), Z_LOSS)[1]
        return torch.autograd.grad(minimised, scores, weights)

    def ours() -> object:
        return head.fused_(logits.clone(), labels, weights, sources, counters, z_loss=Z_LOSS)

    return Forms(torch=torchs, ours=ours)


class _OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class _Overwritable(torch.autograd.Function):
    """A view of a leaf that may be changed in place, as a product's result may."""

    @staticmethod
    def forward(ctx: object, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _whole(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Forms:
    """Loss and gradients of hidden and weight, from hidden and weight."""
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / 16).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    ones, sources = torch.ones(tokens, device=device), torch.zeros(tokens, dtype=torch.int64, device=device)

    def step(total: Callable[[], torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(total(), (hidden, weight))

    def torchs(form: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Call:
        return step(lambda: form(hidden, weight, labels, ones, Z_LOSS)[0])

    return Forms(
        torch=torchs(reference),
        ours=step(lambda: linear_cross_entropy(hidden, weight, labels, ones, sources, 1, Head(z_loss=Z_LOSS)).total),
        peers={
            "torch.compile": lambda: torchs(compiled(reference)),  # type: ignore[arg-type,type-var]
            "Liger": lambda: step(partial(_liger(), hidden, weight, labels)),
            "cut-cross-entropy": lambda: step(partial(_cut(), hidden, weight, labels)),
        },
    )


def _liger() -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    # bias, class weights, ignore_index, z-loss, label smoothing, reduction
    return lambda hidden, weight, labels: Liger.apply(hidden, weight, labels, None, None, -100, Z_LOSS, 0.0, "sum")[0]


def _cut() -> Callable[..., torch.Tensor]:
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda hidden, weight, labels: cut(hidden, weight, labels, reduction="sum", impl="cce_kahan_full_c")
