"""A policy between sources that are split into bands: to it each source is one, its bands' reports taken together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_scheduler.policies import Feedback, make_policy
from data_scheduler.policies.context import Context, SourceSize
from headrace.errors import ConfigError


class Outer:
    """The shares of whole sources; `static` unless told otherwise."""

    def __init__(
        self,
        initial: Mapping[str, float],
        bands: Mapping[str, Sequence[str]],
        outer: Mapping[str, Any] | None,
        context: Context,
    ) -> None:
        """Raises ConfigError for a policy that cannot be used."""
        outer = {"kind": "static"} if outer is None else outer
        kind, options = outer.get("kind"), outer.get("options", {})
        if set(outer) - {"kind", "options"} or not isinstance(kind, str) or not isinstance(options, dict):
            raise ConfigError("data.policy.options.outer: give {kind: POLICY, options: {…}}")
        if kind == "pacing":
            raise ConfigError("data.policy.options.outer: 'pacing' paces bands, it cannot be between sources too")
        whole = {band: source for source, names in bands.items() for band in names}
        self._source_of = {name: whole.get(name, name) for name in initial}
        weights: dict[str, float] = {}
        for name, weight in initial.items():
            source = self._source_of[name]
            weights[source] = weights.get(source, 0.0) + weight
        self._initial = dict(initial)

        def size_of(source: str) -> SourceSize:
            sizes = [context.size_of(name) for name, of in self._source_of.items() if of == source]
            return SourceSize(sum(size.bytes for size in sizes), sum(size.tokens for size in sizes))

        held_out = context.held_out and frozenset(self._source_of.get(name, name) for name in context.held_out)
        inside = replace(context, names=tuple(weights), bands={}, held_out=held_out, size_of=size_of)
        self._policy = make_policy(kind, options, weights, inside)
        self.uses_feedback = self._policy.uses_feedback

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """Weights of whole sources."""
        return self._policy.weights(step, [self._together(report) for report in feedback])

    def wants_validation(self, step: int) -> bool:
        """What the policy says."""
        wants = getattr(self._policy, "wants_validation", None)
        return wants is not None and bool(wants(step))

    def state_dict(self) -> dict[str, Any]:
        """The policy's own state."""
        return self._policy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the policy's state."""
        self._policy.load_state_dict(state)

    def _together(self, report: Feedback) -> Feedback:
        """A report by whole sources: losses are means over tokens, held-out ones over the bands' text."""
        tokens, shares = self._summed(report.source_tokens), self._summed(report.shares)
        losses = self._means(report.source_loss, report.source_tokens)
        held_out = self._means(report.validation_loss, self._initial)
        return Feedback(report.step, losses, tokens, held_out, shares)

    def _summed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            source = self._source_of.get(name, name)
            found[source] = found.get(source, 0) + value
        return found

    def _means(self, values: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
        """Means with `weights`; plain ones where these are all 0."""
        by_source: dict[str, list[tuple[float, float]]] = {}
        for name, value in values.items():
            by_source.setdefault(self._source_of.get(name, name), []).append((value, weights.get(name, 0.0)))
        found = {}
        for source, pairs in by_source.items():
            total = sum(weight for _, weight in pairs)
            found[source] = sum(v * w for v, w in pairs) / total if total else sum(v for v, _ in pairs) / len(pairs)
        return found
