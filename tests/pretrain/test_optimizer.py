"""The optimizer: AdamW's arithmetic, decay on matrices only, clipping, and state a checkpoint can hold."""

import numpy as np
import pytest
import torch
from tiny_run import tiny_batch, tiny_config, tiny_state

from parallel import process_groups
from parallel.adam import GroupStepAdam
from parallel.kernels import extension
from parallel.layout import Layout
from pretrain.config import KernelsConfig
from pretrain.step import train_step

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_is_torchs_adamw(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in ((5, 3), (7,))]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    numbers = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    mine, reference = GroupStepAdam(ours, **numbers), torch.optim.AdamW(theirs, **numbers)  # type: ignore[arg-type]
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert mine.param_groups[0]["step"] == 6
    assert set(mine.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("form", ["torch", pytest.param("fused", marks=built)])
@pytest.mark.parametrize("clip_grad", [0.0, 0.01, 1e6])
def test_a_step_is_torchs_adamw_on_matrices_and_adam_on_the_rest(clip_grad: float, form: str) -> None:
    config = tiny_config("wonton", clip_grad=clip_grad, weight_decay=0.5)
    config = config.model_copy(update={"kernels": KernelsConfig.model_validate({"adamw": form, "grad_norm": form})})
    state = tiny_state(config, Layout(1))
    names = dict(state.chunks[0].named_parameters())
    copies = {name: value.detach().clone().requires_grad_() for name, value in names.items()}
    settings = {"lr": 7e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    matrices = [value for value in copies.values() if value.dim() > 1]
    rest = [value for value in copies.values() if value.dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}],
        **settings,  # type: ignore[arg-type]
    )
    for step in range(2):
        result = train_step(state, tiny_batch(step), 7e-3)
        # torch's kernel has main_grad clipped in place, ours scales it as it reads it.
        gradients = {name: value.main_grad for name, value in names.items()}
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        clipped = min(1.0, clip_grad / result.grad_norm) if clip_grad else 1.0
        assert norm == pytest.approx(result.grad_norm * (clipped if form == "torch" else 1.0), rel=1e-4)
        for name, copy in copies.items():
            copy.grad = gradients[name] * (1.0 if form == "torch" else clipped)
        reference.step()
        for name, copy in copies.items():
            torch.testing.assert_close(names[name], copy, rtol=1e-5, atol=1e-6)
    process_groups.shutdown()


def test_weight_decay_and_rate_follow_the_config_not_the_optimizers_memory() -> None:
    state = tiny_state(tiny_config("wonton", weight_decay=0.5), Layout(1))
    for group in state.optimizer.param_groups:  # what an old checkpoint would bring back
        group["lr"], group["weight_decay"] = 123.0, 123.0
    train_step(state, tiny_batch(0), 1e-3)
    decays = {group["wd_mult"]: group["weight_decay"] for group in state.optimizer.param_groups}
    assert decays == {1.0: 0.5, 0.0: 0.0}
    assert {group["lr"] for group in state.optimizer.param_groups} == {1e-3}
    process_groups.shutdown()


def test_bf16_keeps_fp32_weights_so_that_small_updates_add_up() -> None:
    state = tiny_state(tiny_config("llama", precision="bf16", weight_decay=0.0), Layout(1))
    norm = state.chunks[0].decoder.final_layernorm.weight
    assert norm.dtype == torch.bfloat16
    for step in range(12):  # each update is ~1e-4: far below bf16's spacing at 1.0, which is 8e-3
        train_step(state, tiny_batch(step % 2), 2e-4)
    main = np.concatenate([p.detach().numpy().ravel() for p in [norm.main_param]])
    assert np.abs(main - 1.0).max() > 1e-3
    process_groups.shutdown()
