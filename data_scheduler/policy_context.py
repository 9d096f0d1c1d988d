"""What a run lets its policy know: sizes from manifests, tokens from the plan, numbers from outside by the journal."""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from data_scheduler.bands import bands_of, part_of
from data_scheduler.config import DataConfig
from data_scheduler.encoder import Encoder
from data_scheduler.journal import Journal
from data_scheduler.manifest import Manifest
from data_scheduler.plan import Plan
from data_scheduler.policies.context import Context, SourceSize
from data_scheduler.stages import tokens_before
from data_scheduler.token_estimate import estimate_tokens


class PolicyInputs:
    """Numbers from outside that a policy was given, by name: those in the journal, and new ones to be put there."""

    def __init__(self, journal: Journal) -> None:
        self._known = {event.data["name"]: event.data["value"] for event in journal.of("policy_input")}
        self._new: list[dict[str, Any]] = []

    def recall(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value under `name`; measured the first time."""
        if name not in self._known:
            # As it will be read back, so that the first start and a later one are given the same.
            self._known[name] = orjson.loads(orjson.dumps(measure()))
            self._new.append({"name": name, "value": self._known[name]})
        return self._known[name]

    def take_new(self) -> list[dict[str, Any]]:
        """Data of `policy_input` events to be journaled: what was measured since the last call."""
        new, self._new = self._new, []
        return new


def run_context(
    config: DataConfig,
    manifests: Mapping[str, Manifest],
    encoder: Encoder,
    inputs: PolicyInputs,
    plan: Callable[[], Plan],
    run_steps: int | None,
) -> Context:
    """The context of a run. `plan` is asked only when a policy asks for tokens, when there is one."""
    sources = {source.name: source for source in config.sources}

    def measure(name: str) -> list[float]:
        estimate = estimate_tokens(config, sources[name], manifests[name], encoder)
        return [int(estimate.text_bytes * part_of(sources[name])), estimate.tokens]

    def size_of(name: str) -> SourceSize:
        text_bytes, tokens = inputs.recall(f"size of {name}", lambda: measure(name))
        return SourceSize(int(text_bytes), float(tokens))

    return Context(
        names=tuple(sources),
        run_steps=run_steps,
        horizon=config.policy.horizon,
        seed=config.seed,
        bands=bands_of(config),
        held_out=frozenset(source.name for source in config.sources if source.val_paths),
        size_of=size_of,
        tokens_before=lambda step: tokens_before(plan().shape, step),
        recall=inputs.recall,
    )
