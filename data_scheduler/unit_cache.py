"""The pieces of files read last: their parts belong to many lanes, and each would read them again."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar


class Sized(Protocol):
    """Something that knows how much memory it takes."""

    size: int
    """Bytes of text."""


T = TypeVar("T", bound=Sized)


class UnitCache:
    """The last pieces read, up to `budget` bytes of text."""

    def __init__(self, budget: int = 256 << 20) -> None:
        self.budget = budget
        self._held = 0
        self._pieces: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """The piece called `key`, read when it is not here."""
        if key in self._pieces:
            self._pieces.move_to_end(key)
            held: T = self._pieces[key]
            return held
        piece = read()
        self._pieces[key] = piece
        self._held += piece.size
        while self._held > self.budget and len(self._pieces) > 1:
            _, dropped = self._pieces.popitem(last=False)
            self._held -= dropped.size
        return piece
