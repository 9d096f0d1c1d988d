"""As equal as the sources' sizes allow: no source is repeated more than so many times over the run."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import switched_on
from headrace.errors import ConfigError


def budgets(sizes: Mapping[str, float], total: float, max_epochs: float) -> dict[str, float]:
    """What each source gets of `total`: Algorithm 1 of the paper.

    From the smallest source on, each gets an equal part of what is left, but at most `max_epochs` times its size.
    """
    left, given = total, {}
    by_size = sorted(sizes, key=lambda name: sizes[name])  # stable: equal sizes keep the sources' order
    for number, name in enumerate(by_size):
        given[name] = min(left / (len(by_size) - number), sizes[name] * max_epochs)
        left -= given[name]
    return given


class UniMax:
    """UniMax (Chung et al. 2023, arXiv 2304.09151), Algorithm 1: p = normalised budgets U_l, where from the smallest
    source on U_l = min(what is left of the budget / sources left, N·c_l).

    The plan is for the whole run, with sizes as the sources entered it. What keeps documents from being seen more often
    is a source's `max_epochs`; the two go together.

    max_epochs: N, the most epochs of any source. The paper tries 1, 5 and 10, and uses 1 for umT5.
    tokens: C, the run's budget; that of `train.steps` when not given.
    by: what sizes are counted in, `tokens` (estimated) or `bytes` of text (the paper counts characters). A budget in
    bytes takes the sources' mean bytes per token.
    """

    uses_feedback = False

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        max_epochs: Annotated[float, Field(gt=0.0)] = 1.0,
        tokens: Annotated[int, Field(ge=1)] | None = None,
        by: Literal["tokens", "bytes"] = "tokens",
        *,
        context: Context,
    ) -> None:
        if tokens is None and context.run_steps is None:
            raise ConfigError("data.policy.options of 'unimax': tokens is required where there is no train.steps")
        sizes = {name: context.size_of(name) for name in switched_on(initial)}
        self._sizes = {name: float(getattr(size, by)) for name, size in sizes.items()}
        in_tokens = sum(size.tokens for size in sizes.values())
        self._per_token = sum(self._sizes.values()) / in_tokens if in_tokens else 1.0
        self._max_epochs, self._tokens, self._context = max_epochs, tokens, context
        self._planned: dict[str, Any] = {}

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The same every step, until the run is made longer or gets another source."""
        if not self._planned:
            total = self._tokens or self._context.tokens_before(self._context.run_steps or 0)
            given = budgets(self._sizes, total * self._per_token, self._max_epochs)
            self._planned = {"for": self._question(), "weights": given}
        weights: Mapping[str, float] = self._planned["weights"]
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The plan, so that a change of `seq_len` in a later stage does not make another."""
        return self._planned

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the plan, unless it was made for another run length, other options or other sources."""
        self._planned = dict(state) if state.get("for") == self._question() else {}

    def _question(self) -> list[Any]:
        return [self._tokens or self._context.run_steps, self._max_epochs, list(self._sizes.values())]
