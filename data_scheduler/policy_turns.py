"""Whose turn it is to decide the mixture: the policy of the step at hand, asked once, its mixtures journaled."""

from collections.abc import Callable, Mapping
from typing import Any

from data_scheduler.config import DataConfig, check_horizon
from data_scheduler.journal import Event, Kind
from data_scheduler.mixture import ONE, quantize
from data_scheduler.plan import Chosen, Plan
from data_scheduler.policies import Feedback, Policy
from data_scheduler.policies.context import Context
from data_scheduler.policies.guard import Guard, open_policy
from data_scheduler.reports import Reports
from data_scheduler.stages import policy_of, weights_of
from headrace.errors import ConfigError

Record = Callable[[Kind, int, dict[str, Any], str], Event]
"""(kind, step, data, by): journals an event that takes effect at once."""


def new_policy(
    config: DataConfig, context: Context, kind: str, options: Mapping[str, Any], initial: Mapping[str, float]
) -> Policy:
    """A policy that begins from the weights `initial`. Raises ConfigError when it cannot be, or would hear too late."""
    policy = open_policy(config, context, kind, options, initial)
    check_horizon(config, policy.uses_feedback)
    return policy


def try_policies_of_stages(config: DataConfig, context: Context) -> None:
    """Raise ConfigError for a policy that a later stage could not be given; what it asks of data is measured now."""
    for number, stage in enumerate(config.stages):
        if stage.policy is not None:
            kind, options = policy_of(config, number).values()
            try:
                new_policy(config, context, kind, options, weights_of(config, number))
            except ConfigError as error:
                said = str(error)
                for key in ("kind", "options"):
                    said = said.replace(f"data.policy.{key}", f"stages.{number}.policy.{key}")
                raise ConfigError(said) from None


class PolicyTurns:
    """The policy in force, with what it has heard and what it wanted last; one step after the other."""

    def __init__(
        self, config: DataConfig, context: Context, plan: Plan, policy: Policy, reports: Reports, record: Record
    ) -> None:
        """`policy`: that of the configuration, in force for good where the journal alone decides."""
        self._config, self._context, self._plan, self._reports, self._record = config, context, plan, reports, record
        self._names = [source.name for source in config.sources]
        configured = {source.name: source.weight for source in config.sources}
        self._policy = policy
        self._chosen = Chosen(config.policy.kind, config.policy.options, configured, -1, False)
        self._heard = -1
        self.wanted: dict[str, float] = {}
        """The mixture that the policy wanted last."""

    def begin(self, step: int) -> None:
        """Take up the policy that is in force where the run goes on."""
        self._chosen = self._plan.chosen(max(0, step - 1))
        self._policy = self._new(self._chosen)

    def load(self, step: int, state: dict[str, Any], wanted: Mapping[str, float]) -> None:
        """Go on before `step` with a policy of this state."""
        self._policy.load_state_dict(state)
        self.wanted = dict(wanted)
        self._heard = step - 1 - self._config.policy.horizon

    def state(self) -> dict[str, Any]:
        """The policy's state."""
        return self._policy.state_dict()

    def change(self, step: int) -> None:
        """Take up the policy of `step` if it is another than before, or the same with more sources."""
        chosen, before = self._plan.chosen(step), self._chosen
        if chosen == before:
            return
        policy = self._new(chosen)
        if chosen.goes_on_from(before):
            policy.load_state_dict(self._policy.state_dict())
        else:
            self._heard = step - 1 - self._config.policy.horizon
        self._policy, self._chosen = policy, chosen

    def _new(self, chosen: Chosen) -> Policy:
        return new_policy(self._config, self._context, chosen.kind, chosen.options, chosen.initial)

    def ask(self, step: int) -> Mapping[str, float]:
        """What the policy wants for a step; it is asked once for each."""
        wanted = self._policy.weights(step, self._feedback_for(step))
        if isinstance(self._policy, Guard):
            for kind, data in self._policy.take_notes():
                self._record(kind, step, data, f"policy:{self._chosen.kind}")
        return wanted

    def _feedback_for(self, step: int) -> list[Feedback]:
        """Reports up to step − horizon that the policy has not heard yet; waits for them while training catches up."""
        last = step - self._config.policy.horizon
        if not self._policy.uses_feedback:
            self._heard = max(self._heard, last)
            self._reports.forget(last)
            return []
        if last <= self._heard:
            return []
        heard = self._reports.take(max(0, self._heard + 1), last)
        self._heard = last
        return heard

    def record(self, step: int, wanted: Mapping[str, float]) -> None:
        """Journal a mixture that the policy wants, where it decides and this is another than before.

        What a person set stays. Most policies repeat themselves: nothing to do then, unless another has just begun.
        """
        in_force = self._plan.mixture.at(step)
        begins = self._plan.deciding(step) != self._plan.deciding(step - 1)
        if self._plan.person_decides(step) is None and (begins or wanted != self.wanted or in_force is None):
            # Shares as they will be used, so that the journal's numbers are the exact ones.
            shares = quantize(wanted, self._names) / ONE
            exact = dict(zip(self._names, shares.tolist(), strict=True))
            if begins or exact != in_force:
                self._record("mixture", step, {"weights": exact}, f"policy:{self._chosen.kind}")
        self.wanted = dict(wanted)
