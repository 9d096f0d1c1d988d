"""A source's loss over tokens, kept as a bounded number of means however long the run."""

from typing import Any

POINTS = 64
"""Means kept at most; when there are as many, neighbours are joined in pairs, and a mean covers twice as much."""


class LossCurve:
    """Means of `width` losses each, `width` doubling as the run goes on.

    The lists it saves are never changed, only replaced: a state that was handed out stays what it was, and saving one
    after every step costs nothing.
    """

    _width: int
    _open: list[Any]
    tokens: list[float]
    losses: list[float]

    def __init__(self, width: int) -> None:
        self._first_width = width
        self.load({})

    def add(self, tokens: float, loss: float) -> None:
        """A loss measured after `tokens`."""
        number, token_sum, loss_sum = self._open
        number, token_sum, loss_sum = number + 1, token_sum + tokens, loss_sum + loss
        if number < self._width:
            self._open = [number, token_sum, loss_sum]
            return
        self._open = [0, 0.0, 0.0]
        self.tokens = [*self.tokens, token_sum / number]
        self.losses = [*self.losses, loss_sum / number]
        if len(self.tokens) == POINTS:
            self.tokens = [(a + b) / 2 for a, b in zip(self.tokens[::2], self.tokens[1::2], strict=True)]
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]
            self._width *= 2

    def save(self) -> dict[str, Any]:
        """As plain data."""
        return {"width": self._width, "open": self._open, "tokens": self.tokens, "losses": self.losses}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `save` gave."""
        self._width = state.get("width", self._first_width)
        self._open = list(state.get("open", [0, 0.0, 0.0]))
        self.tokens = list(state.get("tokens", []))
        self.losses = list(state.get("losses", []))
