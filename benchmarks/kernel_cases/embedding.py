"""The gradient of an embedding's table, sorting included: added to a step's fp32 sum, and as a tensor of its own."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kernel_cases.case import Case, Forms
from parallel.kernels import embedding

# (tokens of a micro-batch, rows, width): quickstart's, a 125M model's, and a large vocabulary.
SHAPES = ((8 * 256, 8192, 256), (4096, 32_000, 768), (8192, 139_776, 1024))


def cases() -> Iterator[Case]:
    for tokens, rows, width in SHAPES:
        for dtype in embedding.DTYPES:
            different = int(_tokens(tokens, rows, torch.device("cpu")).unique().numel())
            read = tokens * width * dtype.itemsize
            for part, moved in (
                ("backward", read + 2 * different * width * 4),
                ("backward, own tensor", read + (rows + different) * width * dtype.itemsize),
            ):
                yield Case(
                    kernel=embedding.KERNEL,
                    part=part,
                    shape=f"{tokens} tokens, {rows} x {width}",
                    dtype=dtype,
                    bytes_moved=moved,
                    target=0.6,
                    build=partial(_forms, part == "backward", tokens, rows, width, dtype),
                )


def _tokens(tokens: int, rows: int, device: torch.device) -> torch.Tensor:
    """Frequent and rare ones: the most frequent tenth of the vocabulary has 46 % of the places."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(tokens, generator=generator) ** 3 * rows).long().to(device)


def _forms(summed: bool, tokens: int, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Forms:
    ids = _tokens(tokens, rows, device)
    weight = torch.zeros(rows, width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, width, device=device, dtype=dtype)
    totals = [torch.zeros(rows, width, device=device) if summed else None for _ in range(2)]
    found = F.embedding(ids, weight)

    def by_torch() -> None:
        (gradient,) = torch.autograd.grad(found, weight, grad, retain_graph=True)
        if totals[0] is not None:
            totals[0].add_(gradient)

    return Forms(torch=by_torch, ours=partial(embedding.table_gradient, grad, ids, rows, 0, totals[1]))
