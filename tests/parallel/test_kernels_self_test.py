"""`headrace doctor --kernels`: every operator is tried, and one that computes wrongly is found."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from parallel.kernels import choice, extension, self_test, swiglu
from pretrain.cli import app

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
CPU = torch.device("cpu")


def test_every_operator_has_a_trial() -> None:
    assert set(self_test.trials()) == set(choice.kernels())


@built
@pytest.mark.parametrize("dtype", self_test.ALLOWED)
@pytest.mark.parametrize("name", self_test.trials())
def test_fused_forms_pass(name: str, dtype: torch.dtype) -> None:
    result = self_test.compare(self_test.trials()[name], dtype, CPU)
    assert result.passed, result
    assert result.ratio > 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda gate_up: swiglu.reference(gate_up) * 1.02,
        lambda gate_up: swiglu.reference(gate_up).detach() + 0 * gate_up.chunk(2, dim=-1)[0],  # its gradient is 0
        lambda gate_up: swiglu.reference(gate_up) / 0 * 0,
    ],
    ids=["result", "gradient", "NaN"],
)
def test_a_wrong_form_does_not_pass(wrong: object) -> None:
    trial = dataclasses.replace(swiglu.TRIAL, fused=wrong)
    assert not any(self_test.compare(trial, dtype, CPU).passed for dtype in self_test.ALLOWED)


@built
def test_the_doctor_prints_them() -> None:
    answer = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert answer.exit_code == 0, answer.output
    assert "swiglu  fused: faster than torch on cpu" in answer.output
    assert "float32   largest error" in answer.output


@built
def test_a_wrong_kernel_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(swiglu.TRIAL, fused=lambda gate_up: swiglu.reference(gate_up) * 1.02)
    monkeypatch.setattr(self_test, "trials", lambda: {"swiglu": wrong})
    answer = CliRunner().invoke(app, ["doctor", "--kernels"])
    said = str(answer.exception)
    assert said.startswith("kernels that are not as near to float64 as they should be: swiglu in float32, swiglu in bf")
    assert "\n" not in said
