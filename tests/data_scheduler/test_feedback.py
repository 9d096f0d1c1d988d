"""What training reports shapes the steps to come, alike after a stop."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from data_scheduler import DataConfig, Scheduler, batch_sha256, policy_turns
from data_scheduler.policies import Feedback
from headrace.errors import ConfigError

Make = Callable[..., DataConfig]


class Chaser:
    """Test policy: all weight to the source with the highest reported loss."""

    uses_feedback = True

    def __init__(self, initial: Mapping[str, Any]) -> None:
        self._names = list(initial)
        self._latest: dict[str, float] = {}
        self.heard: list[int] = []

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        for report in feedback:
            self._latest.update(report.source_loss)
            self.heard.append(report.step)
        worst = max(self._names, key=lambda name: (self._latest.get(name, 0.0), name))
        return {name: 4.0 if name == worst else 1.0 for name in self._names}

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self._latest, "heard": list(self.heard)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._latest, self.heard = dict(state.get("latest", {})), list(state.get("heard", []))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_feedback_shapes_later_steps_the_same_way_after_a_stop(
    data_config: Make, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    monkeypatch.setattr(
        policy_turns, "open_policy", lambda config, context, *chosen: Chaser(dict.fromkeys(context.names))
    )

    def go(scheduler: Scheduler, first: int, last: int) -> list[str]:
        hashes = []
        for step in range(first, last):
            batch = next(scheduler)
            hashes.append(batch_sha256(batch.digests))
            losses = {name: float((step * 7 + 3 * number) % 11) for number, name in enumerate("abcd")}
            scheduler.feedback(step, losses, dict.fromkeys("abcd", 10))
        return hashes

    config = data_config(prefetch=prefetch, policy={"kind": "static", "horizon": 5})
    whole = Scheduler(config)
    expected = go(whole, 0, 30)
    assert len({event.step for event in whole.journal.of("mixture")}) > 3
    assert whole.state_dict()["policy"]["heard"] == list(range(25))
    whole.close()
    for stop in (1, 4, 7, 19):
        first = Scheduler(config)
        hashes = go(first, 0, stop)
        state = json.loads(json.dumps(first.state_dict(), default=lambda array: array.tolist()))
        first.close()
        second = Scheduler(data_config(prefetch=4 - prefetch, policy={"kind": "static", "horizon": 5}))
        second.load_state_dict(state)
        assert hashes + go(second, stop, 30) == expected
        second.close()


def test_horizon_must_pass_prefetch(data_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        policy_turns, "open_policy", lambda config, context, *chosen: Chaser(dict.fromkeys(context.names))
    )
    with pytest.raises(ConfigError, match="horizon"):
        Scheduler(data_config(prefetch=8))
