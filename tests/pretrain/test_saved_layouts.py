"""What a checkpoint says of the layout it was saved under, and what is done with it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import tiny_batch, tiny_config, tiny_state

from parallel import process_groups
from parallel.layout import Layout
from pretrain import checkpoint, checkpoint_saving
from pretrain.step import train_step


@pytest.mark.parametrize(("saved", "restored"), [({}, True), ({"overlap_grad_reduce": True}, False)])
def test_fields_that_came_later_have_their_defaults(
    saved: dict[str, bool], restored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The position of the data is another test's business.
    monkeypatch.setattr(checkpoint_saving, "save_state", lambda *_: None)
    monkeypatch.setattr(checkpoint, "load_state", lambda _: {})
    monkeypatch.setattr(checkpoint, "Snapshots", lambda _: SimpleNamespace(save=lambda _: None))
    state = tiny_state(tiny_config(), Layout(1))
    train_step(state, tiny_batch(0), 1e-3)
    path = checkpoint.Checkpoints(tmp_path).save(state, {}, checkpoint.Progress(1, 0))
    meta = checkpoint.read_meta(path)
    old = ["world_size", "tensor_parallel_size", "sequence_parallel", "pipeline_parallel_size", "context_parallel_size"]
    old += ["virtual_pipeline_parallel_size", "distributed_optimizer"]
    meta["layout"] = {key: meta["layout"][key] for key in old} | saved
    (path / "meta.json").write_text(json.dumps(meta))
    before = torch.get_rng_state()
    torch.rand(1)
    checkpoint.load(path, state)
    assert torch.equal(torch.get_rng_state(), before) == restored
    process_groups.shutdown()
