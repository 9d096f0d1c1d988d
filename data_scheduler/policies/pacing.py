"""Curricula: within a source that is split into bands, the easy ones first."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.order import permutation
from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import normalized
from data_scheduler.policies.outer import Outer
from data_scheduler.policies.pacing_functions import PLAIN, Function, band_by_band, cyclical, root, step
from headrace.errors import ConfigError

UNITS = ("step", "tokens", "share")
Order = Literal["curriculum", "anti", "random"]
Weights = Mapping[str, float]
Place = Annotated[int, Field(ge=0)]
Part = Annotated[float, Field(ge=0.0, le=1.0)]


class Pacing:
    """Of each source with bands the part c(x) is open, easiest first, where x goes from 0 to 1 as training goes on:

        p_k ∝ |[s_{k−1}, s_k] ∩ [0, c(x)]|,   s_k the part of the source's text in bands 1 … k

    as if the easiest c(x) of the text were drawn from evenly. With `replay` r the band that c(x) is in gets 1 − r, and
    those before it, which are passed, r in proportion to their text; r = 0 is a band at a time. From x = 1 on c = 1.
    The source's own share is its weight; sources without bands follow theirs.

    function: c, as in `pacing_functions`: constant, linear, root, step, geometric or cyclical.
    order: which bands come first: easy ones (`curriculum`), hard ones (`anti`), or a seeded order (`random`). The
        latter two are controls, those of Wu et al. 2021 (arXiv 2012.03107): with the same pacing, does the order help?
    start: c(0); the first band when not given, for `constant` everything.
    exponent: p of `root`, 2.    cycles: m of `cyclical`, 4.
    levels: n of `step`; without it and `start` a band more each time.
    replay: r.
    from_step, to_step | from_tokens, to_tokens | from_share, to_share: where x is 0 and 1; the whole run. Tokens are
        those of the steps before, `seq_len` · `global_batch_size` each; a share is one of `train.steps`.
    outer: {kind, options}: a policy for the shares between the sources, to which each source is one; the weights.
    """

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        function: Function,
        order: Order = "curriculum",
        start: Annotated[float, Field(gt=0.0, le=1.0)] | None = None,
        exponent: Annotated[float, Field(gt=0.0)] | None = None,
        levels: Annotated[int, Field(ge=2)] | None = None,
        cycles: Annotated[float, Field(gt=0.0)] | None = None,
        replay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None,
        from_step: Place | None = None,
        to_step: Place | None = None,
        from_tokens: Place | None = None,
        to_tokens: Place | None = None,
        from_share: Part | None = None,
        to_share: Part | None = None,
        outer: dict[str, Any] | None = None,
        *,
        context: Context,
    ) -> None:
        self._context, self._replay = context, replay
        own = {"exponent": ("root", exponent), "levels": ("step", levels), "cycles": ("cyclical", cycles)}
        for name, (of, value) in own.items():
            if value is not None and of != function:
                raise ConfigError(f"data.policy.options.{name}: an option of function {of!r}, not of {function!r}")
        bands = {of: names for of, names in context.bands.items() if all(name in initial for name in names)}
        if not bands:
            raise ConfigError("data.policy: 'pacing' needs a source with `bands`")
        self._function = function
        self._paces = {
            source: _Pace(
                ordered(names, initial, order, context.seed, source), function, start, exponent, levels, cycles
            )
            for source, names in bands.items()
        }
        self._bounds(from_step, to_step, from_tokens, to_tokens, from_share, to_share)
        self._outer = Outer(initial, bands, outer, context)
        self.uses_feedback = self._outer.uses_feedback

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Weights:
        """The mixture at `step`."""
        x = self._at(step)
        given: dict[str, float] = {}
        for source, weight in self._outer.weights(step, feedback).items():
            pace = self._paces.get(source)
            parts = {source: 1.0} if pace is None else pace.shares(x, self._replay)
            given |= {name: weight * part for name, part in parts.items()}
        return {name: given[name] for name in self._context.names if name in given}

    def wants_validation(self, step: int) -> bool:
        """What the policy between the sources says."""
        return self._outer.wants_validation(step)

    def state_dict(self) -> dict[str, Any]:
        """That of the policy between the sources; of the pacing the step says it all."""
        return self._outer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._outer.load_state_dict(state)

    def _bounds(self, *given: float | None) -> None:
        """Take from- and to- of each unit in turn."""
        named = {unit: given[2 * number : 2 * number + 2] for number, unit in enumerate(UNITS)}
        used = [unit for unit, pair in named.items() if pair != (None, None)]
        if len(used) > 1:
            raise ConfigError(f"data.policy.options: begin and end in one unit, not in {' and '.join(used)}")
        self._unit = used[0] if used else "share"
        begin, end = named[self._unit]
        if self._unit == "share" and self._context.run_steps is None:
            raise ConfigError(
                "data.policy.options: from_share and to_share need train.steps; give to_step or to_tokens"
            )
        if end is None and self._unit != "share":
            raise ConfigError(f"data.policy.options.to_{self._unit}: required with from_{self._unit}")
        self._begin, self._end = begin or 0.0, 1.0 if end is None else end
        if self._begin >= self._end:
            raise ConfigError(f"data.policy.options.to_{self._unit}: {self._end:g} does not come after {self._begin:g}")

    def _at(self, step: int) -> float:
        """x at `step`, from 0 to 1."""
        at: float = step
        if self._unit == "tokens":
            at = self._context.tokens_before(step)
        elif self._unit == "share":
            at = step / (self._context.run_steps or 1)
        return min(1.0, max(0.0, (at - self._begin) / (self._end - self._begin)))


class _Pace:
    """The pacing of one source."""

    def __init__(
        self,
        sizes: Mapping[str, float],
        function: Function,
        start: float | None,
        exponent: float | None,
        levels: int | None,
        cycles: float | None,
    ) -> None:
        """sizes: the bands in the order they are opened in, each with its part of the source's text; sum 1."""
        self._sizes, self._ends_open = dict(sizes), function != "constant"
        self._b = start if start is not None else next(iter(sizes.values())) if self._ends_open else 1.0
        given: dict[str, Callable[[float, float], float]] = {
            "root": partial(root, exponent=2.0 if exponent is None else exponent)
        }
        given["step"] = partial(step, levels=len(sizes) if levels is None else levels)
        if levels is None and start is None:
            ends = list(accumulate(sizes.values()))
            given["step"] = lambda x, b: band_by_band(x, ends)
        given["cyclical"] = partial(cyclical, cycles=4.0 if cycles is None else cycles)
        self._open: Callable[[float, float], float] = given.get(function) or PLAIN[function]

    def shares(self, x: float, replay: float | None) -> dict[str, float]:
        """Each band's part of the source's share at x."""
        c = 1.0 if x >= 1.0 and self._ends_open else self._open(x, self._b)
        if replay is None:
            return normalized(overlaps(self._sizes, c))
        return replayed(self._sizes, c, replay)


def overlaps(sizes: Mapping[str, float], c: float) -> dict[str, float]:
    """Of each band how much is within the first `c` of all; sizes sum to 1."""
    before, found = 0.0, {}
    for name, size in sizes.items():
        found[name] = min(size, max(0.0, c - before))
        before += size
    if not any(found.values()):  # c rounded to nothing
        found[next(iter(sizes))] = 1.0
    return found


def replayed(sizes: Mapping[str, float], c: float, replay: float) -> dict[str, float]:
    """1 − replay for the band that `c` is in, `replay` for those before it, in proportion to their sizes."""
    opened = overlaps(sizes, c)
    # A band that rounding has opened by 1e-17 is not open.
    current = [name for name, part in opened.items() if part > 1e-9 * max(1e-300, sizes[name])][-1]
    names = list(sizes)
    passed = sum(sizes[name] for name in names[: names.index(current)])
    if not passed:
        return {name: float(name == current) for name in names}
    given = {name: replay * sizes[name] / passed for name in names[: names.index(current)]}
    return {name: 1 - replay if name == current else given.get(name, 0.0) for name in names}


def ordered(names: Sequence[str], initial: Weights, order: Order, seed: int, source: str) -> dict[str, float]:
    """The bands, easiest first in `names`, in the order they are opened in, each with its part of the source."""
    if order == "anti":
        names = names[::-1]
    elif order == "random":
        names = [names[place] for place in permutation(len(names), seed, "pacing", source).tolist()]
    weights = {name: initial[name] for name in names}
    return normalized(weights if any(weights.values()) else dict.fromkeys(names, 1.0))
