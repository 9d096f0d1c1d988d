"""Settings that would silently do nothing, or harm, are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import maker

from data_scheduler import DataConfig
from headrace.errors import ConfigError
from pretrain.config import ControlConfig
from pretrain.control.desk import Desk
from pretrain.control.request import Request


def test_replicas_are_asked_for_where_a_later_stage_has_none(
    data_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    make = maker(data_config, tmp_path, recovery__replicas_every=10)
    stages = [{"from_step": 6, "parallel": {"fully_sharded": True}}]
    with pytest.raises(ConfigError, match=r"replicas_every: with parallel.fully_sharded"):
        make("run", stages=stages)
    make("run", stages=[{"from_step": 6, "parallel": {"distributed_optimizer": True}}])


@pytest.mark.parametrize("reason", [None, "the run has ended at step 12"])
def test_a_desk_that_closes_for_a_moment_says_so(tmp_path: Path, reason: str | None) -> None:
    answers: list[dict[str, object]] = []
    desk = Desk(ControlConfig(), tmp_path)
    desk.hand(Request.model_validate({"id": "x" * 16, "ask": {"command": "pause"}}), "me", "http", answers.append)
    desk.close(reason, "the run goes on from its checkpoint in a moment")
    assert [each["reason"] for each in answers] == [reason or "the run goes on from its checkpoint in a moment"]
