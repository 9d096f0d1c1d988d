"""Model FLOPs utilisation: the definition by hand, peaks by name, and what records have."""

import json
from pathlib import Path

import pytest
from small_run import maker
from tiny_run import tiny_config

from pretrain.models.sizes import flops_per_token
from pretrain.train import train
from pretrain.utilisation import Utilisation, peak_flops


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("8 × NVIDIA H200", 989e12),
        ("4 × NVIDIA H200 NVL", 835e12),
        ("1 × NVIDIA GH200 480GB", 989e12),
        ("1 × NVIDIA H100 PCIe", 756e12),
        ("8 × NVIDIA H100 80GB HBM3", 989e12),
        ("4 × NVIDIA A100-SXM4-80GB", 312e12),
        ("1 × NVIDIA H20", 148e12),
        ("1 × NVIDIA L4", 121e12),
        ("1 × NVIDIA L40S", 362e12),
        ("1 × NVIDIA RTX A4000", None),
        ("1 × NVIDIA GeForce RTX 4090", None),
        ("cpu (x86_64 L4)", None),
    ],
)
def test_peaks_are_those_of_the_device_that_is_named(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


def test_a_step_that_computes_for_half_of_its_time_uses_half_of_its_devices() -> None:
    config = tiny_config()
    full, causal = flops_per_token(config.model, 512, 64)
    tokens, devices, peak = 64 * 16, 4, 312e12
    took_s = 2 * full * tokens / (devices * peak)
    found = Utilisation(config, 512, devices, "NVIDIA A100").of_step(64, tokens, took_s)
    assert found["mfu"] == pytest.approx(0.5)
    assert found["mfu_causal"] == pytest.approx(0.5 * causal / full)
    assert found["model_flops_per_s"] == pytest.approx(peak / 2)


def test_a_device_without_a_known_peak_has_no_share_of_it_unless_it_is_given() -> None:
    config = tiny_config()
    assert set(Utilisation(config, 512, 1, "cpu").of_step(64, 64, 1.0)) == {"model_flops_per_s"}
    given = config.model_copy(update={"metrics": config.metrics.model_copy(update={"peak_flops": 1e12})})
    found = Utilisation(given, 512, 1, "cpu").of_step(64, 64, 1.0)
    assert found["mfu"] == pytest.approx(found["model_flops_per_s"] / 1e12)


def test_records_tell_the_parts_of_a_step(data_config, tmp_path: Path) -> None:
    train(maker(data_config, tmp_path)("run", train__steps=3, metrics__peak_flops=1e11))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if "loss" in line]
    assert len(records) == 3
    for record in records:
        parts = [record[name] for name in ("data_wait_s", "passes_s", "update_s")]
        assert min(parts) >= 0
        assert record["passes_s"] > 0
        assert sum(parts) <= record["step_s"]  # one process: its parts are those of the whole
        assert record["mfu"] == pytest.approx(record["model_flops_per_s"] / 1e11)
        assert 0 < record["mfu_causal"] < record["mfu"]
