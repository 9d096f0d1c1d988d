from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, IterableDataset

from data_scheduler import DataConfig, DataScheduler, merge_states
from data_scheduler.config import PolicyConfig
from headrace.errors import ConfigError

Make = Callable[..., DataConfig]


def test_batches_are_tensors_of_the_promised_kinds(data_config: Make) -> None:
    scheduler = DataScheduler.from_config(data_config())
    assert isinstance(scheduler, IterableDataset)
    batch = next(iter(scheduler))
    assert {name: (tensor.dtype, tensor.dim()) for name, tensor in batch.items()} == {
        "tokens": (torch.int64, 2),
        "cu_seqlens": (torch.int32, 1),
        "position_ids": (torch.int64, 2),
        "source_ids": (torch.int64, 1),
        "document_ids": (torch.int64, 1),
        "loss_mask": (torch.bool, 2),
        "loss_weights": (torch.float32, 2),
        "prefix_lengths": (torch.int64, 1),
    }
    assert batch["tokens"].shape == (24, 65)
    assert len(batch["document_ids"]) == len(batch["cu_seqlens"]) - 1


def test_a_dataloader_passes_batches_on_and_workers_are_refused(data_config: Make) -> None:
    direct = next(iter(DataScheduler.from_config(data_config())))
    loader = DataLoader(DataScheduler.from_config(data_config()), batch_size=None)
    assert torch.equal(next(iter(loader))["tokens"], direct["tokens"])
    with pytest.raises(ConfigError, match="num_workers=0") as caught:
        next(iter(DataLoader(DataScheduler.from_config(data_config()), batch_size=None, num_workers=2)))
    assert "\n" not in str(caught.value)


def test_state_moves_to_another_number_of_ranks(data_config: Make) -> None:
    whole = iter(DataScheduler.from_config(data_config()))
    expected = [next(whole)["tokens"] for _ in range(7)]
    ranks = [DataScheduler.from_config(data_config(), dp_rank=rank, dp_size=2) for rank in range(2)]
    for rank in ranks:
        batches = iter(rank)
        for _ in range(4):
            next(batches)
    state = merge_states([rank.state_dict() for rank in ranks])
    three = [DataScheduler.from_config(data_config(), dp_rank=rank, dp_size=3) for rank in range(3)]
    for rank in three:
        rank.load_state_dict(state)
    parts = [next(iter(rank))["tokens"] for rank in three]
    assert torch.equal(torch.stack(parts, dim=1).reshape(24, 65), expected[4])
    with pytest.raises(ConfigError, match="merge the states of all ranks first"):
        three[1].load_state_dict(ranks[0].state_dict())


@pytest.mark.parametrize("whole_run", [True, False])
def test_yaml_files_of_a_run_or_of_data_alone(data_config: Make, tmp_path: Path, whole_run: bool) -> None:
    data = data_config().model_dump()
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": "x"}, "data": data} if whole_run else data))
    assert next(iter(DataScheduler.from_config(path)))["tokens"].shape == (24, 65)
    path.write_text(yaml.safe_dump({"data": data | {"seqlen": 4}}))
    with pytest.raises(ConfigError, match="seqlen"):
        DataScheduler.from_config(path)
    with pytest.raises(ConfigError, match=r"none.yaml: file not found"):
        DataScheduler.from_config(tmp_path / "none.yaml")


def test_policies_are_found_by_name_and_their_options_checked(data_config: Make) -> None:
    def attempt(**policy: object) -> None:
        DataScheduler.from_config(data_config(policy=PolicyConfig.model_validate(policy)))

    with pytest.raises(ConfigError, match=r"no policy 'statik' \(known: .*static"):
        attempt(kind="statik")
    with pytest.raises(ConfigError, match=r"data.policy.options of 'schedule'"):
        attempt(kind="schedule", options={"stagse": []})
    with pytest.raises(ConfigError, match=r"stages.0.weights: no source 'x' \(sources: a, b, c, d\)"):
        attempt(kind="schedule", options={"stages": [{"from_step": 3, "weights": {"x": 1.0}}]})
    with pytest.raises(ConfigError, match=r"stages.1.from_step: 3 does not come after 3"):
        attempt(kind="schedule", options={"stages": [{"from_step": 3, "weights": {"a": 1}}] * 2})
