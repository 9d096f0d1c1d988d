"""Norms: torch's, in the model's precision, marked for sequence parallelism."""

from types import SimpleNamespace

import pytest
import torch

from parallel.norms import Norm


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_and_marks(normalization: str, sequence_parallel: bool) -> None:
    config = SimpleNamespace(
        normalization=normalization, sequence_parallel=sequence_parallel, params_dtype=torch.bfloat16
    )
    norm = Norm(config, hidden_size=16, eps=1e-3)
    parameters = dict(norm.named_parameters())
    assert set(parameters) == ({"weight"} if normalization == "RMSNorm" else {"weight", "bias"})
    assert all(parameter.sequence_parallel == sequence_parallel for parameter in parameters.values())  # type: ignore[attr-defined]
    assert all(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm.float()(x), expected, rtol=1e-5, atol=1e-5)
