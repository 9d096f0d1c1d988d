"""Tensors to update by AdamW, in each of the four forms that weights have."""

from dataclasses import dataclass, field, replace

import torch

from parallel.kernels.adamw import Group

FORMS = ("master", "copy", "remainder", "stochastic")


@dataclass
class Case:
    """Arguments of `adamw.fused` and `adamw.reference`."""

    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    groups: list[Group]
    lows: list[torch.Tensor] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)

    @property
    def lists(self) -> tuple[list[torch.Tensor], ...]:
        return self.weights, self.gradients, self.exp_avgs, self.exp_avg_sqs

    @property
    def changed(self) -> list[torch.Tensor]:
        """All that an update writes."""
        return [*self.weights, *self.lows, *self.exp_avgs, *self.exp_avg_sqs]

    def copy(self) -> "Case":
        """The same numbers in memory of their own."""
        names = ("weights", "gradients", "exp_avgs", "exp_avg_sqs", "lows")
        return replace(self, **{name: [tensor.clone() for tensor in getattr(self, name)] for name in names})

    def doubled(self) -> "Case":
        """In float64, for masters."""
        names = ("weights", "gradients", "exp_avgs", "exp_avg_sqs")
        return replace(self, **{name: [tensor.double() for tensor in getattr(self, name)] for name in names}, lows=[])


def case(form: str, sizes: list[int], gradient: torch.dtype = torch.float32, seed: int = 0, step: int = 3) -> Case:
    """In the middle of training: moments that are not zero. One group for the first tensor, one for the others."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(scale: float) -> list[torch.Tensor]:
        return [torch.randn(size, generator=generator) * scale for size in sizes]

    masters, gradients, exp_avgs = numbers(0.5), numbers(0.1), numbers(0.05)
    exp_avg_sqs = [tensor.square() for tensor in numbers(0.1)]
    groups = [Group(1, 3e-3, 0.1, 0.9, 0.95, 1e-8, step), Group(len(sizes) - 1, 1e-2, 0.0, 0.8, 0.99, 1e-6, step)]
    lows = []
    weights = masters
    if form == "copy":
        lows = [master.bfloat16() for master in masters]
    elif form != "master":
        weights = [master.bfloat16() for master in masters]
        if form == "remainder":
            lows = [torch.randint(-(2**15), 2**15, (size,), generator=generator, dtype=torch.int16) for size in sizes]
    bases = [1000 * number + 7 for number in range(len(sizes))]
    return Case(weights, [each.to(gradient) for each in gradients], exp_avgs, exp_avg_sqs, groups, lows, bases)


def masters(case: Case) -> list[torch.Tensor]:
    """fp32 numbers that the weights stand for, put together by other means than the code's."""
    if not case.lows or case.weights[0].dtype != torch.bfloat16:
        return [weight.float() for weight in case.weights]
    joined = []
    for weight, low in zip(case.weights, case.lows, strict=True):
        lower = low.numpy().view("uint16").astype("int64")
        upper = weight.view(torch.int16).numpy().view("uint16").astype("int64") - (lower >= 2**15)
        joined.append(torch.from_numpy(((upper * 2**16 + lower) % 2**32).astype("uint32").view("float32")))
    return joined


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bf16, remainder) of fp32 numbers, rounded to nearest with ties away from zero."""
    bits = master.numpy().view("uint32").astype("int64")
    upper = ((bits + 2**15) // 2**16).astype("uint16")
    lower = (bits % 2**16).astype("uint16")
    return torch.from_numpy(upper.view("int16")).view(torch.bfloat16), torch.from_numpy(lower.view("int16"))
