"""What reading a unit gives: documents, and for everything else the reason why it is none."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class MarkedText(NamedTuple):
    """Text of which some stretches carry no loss, or all of which has a weight of its own in the loss."""

    pieces: tuple[tuple[str, bool], ...]
    """(text, whether its tokens are learned). Each piece is encoded by itself, so that no token spans an edge."""
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.pieces)


class Versions(NamedTuple):
    """The texts that a record may become; transforms draw one of them in each epoch."""

    choices: tuple[tuple[tuple[tuple[str, ...], bool], ...], ...]
    """Per template its pieces: (their parts, whether their tokens are learned). Parts are joined once a text is drawn:
    several templates then take little more memory than one."""
    weight: float
    prefixes: tuple[str, ...]
    """Text of each transform `prefix`, in order."""

    def choose(self, choice: int) -> MarkedText:
        """The text of one template."""
        return MarkedText(tuple(("".join(parts), learned) for parts, learned in self.choices[choice]), self.weight)

    @property
    def text(self) -> str:
        """The whole text under the first template."""
        return self.choose(0).text


Tokens = npt.NDArray[np.unsignedinteger[Any]]
Document = str | MarkedText | Versions | Tokens
"""Text, or token ids of data that was tokenized before."""


class MarkedTokens(NamedTuple):
    """What transforms made of a document."""

    pieces: tuple[tuple[Tokens, bool], ...]
    """(tokens, whether they are learned)."""
    weight: float = 1.0
    prefix_length: int = 0
    """Tokens at its begin that see one another in both directions."""


REASON_CHARACTERS = 300


class Unit(NamedTuple):
    """Where to find a piece of a file. `start`, `stop`: bytes for line files, row groups or record batches for columns,
    documents for token files; 0 and -1: all of it."""

    path: str
    start: int
    stop: int


class Reject(NamedTuple):
    """A record that cannot be used."""

    record: int
    """Place of the record within its unit."""
    reason: str
    own: bool = False
    """Of a band: whether the record is known to be one of its own."""


@dataclass
class Records:
    """The content of one unit, in file order; `documents[i]` is None where record i was rejected or filtered out."""

    documents: list[Document | None] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    filtered: int = 0
    """Records that the source's `where` left out, or that are in other bands."""
    elsewhere: bytearray = field(default_factory=bytearray)
    """Of a band: 1 for each record that is in another band; ends after the last of them."""
    size: int = 0
    """Bytes of text, for caches."""
    blocks: list[tuple[int, int]] = field(default_factory=list)
    """Line files: (place of its first record, number) of every block these records were read from."""

    @property
    def read(self) -> int:
        """Records that rejects are a part of: all but those that `where` left out, those in other bands included."""
        return len(self.documents) - self.filtered + self.elsewhere.count(1)

    def reject(self, reason: str, own: bool = False) -> None:
        """Record the next record as unusable."""
        told = " ".join(reason[: 2 * REASON_CHARACTERS].split())  # one line, whatever a library quotes of the data
        self.rejects.append(Reject(len(self.documents), told[:REASON_CHARACTERS], own))
        self.documents.append(None)

    def leave_out(self) -> None:
        """Record the next record as filtered out."""
        self.filtered += 1
        self.documents.append(None)

    def leave_to_others(self) -> None:
        """Record the next record as one of another band."""
        self._put_elsewhere(len(self.documents))
        self.filtered += 1
        self.documents.append(None)

    def without_strays(self) -> "Records":
        """The records with rejects that are not known to be of this band left to the band that takes them."""
        for reject in self.rejects:
            if not reject.own:
                self._put_elsewhere(reject.record)
                self.filtered += 1
        self.rejects = [reject for reject in self.rejects if reject.own]
        return self

    def only(self, places: range) -> "Records":
        """The records at `places`, as if they were all."""
        documents = [self.documents[place] for place in places]
        rejects = [
            reject._replace(record=places.index(reject.record)) for reject in self.rejects if reject[0] in places
        ]
        filtered = sum(document is None for document in documents) - len(rejects)
        elsewhere = self.elsewhere[places.start : places.stop : places.step]
        return Records(documents, rejects, filtered, elsewhere)

    def _put_elsewhere(self, place: int) -> None:
        if place >= len(self.elsewhere):
            self.elsewhere.extend(bytes(place + 1 - len(self.elsewhere)))
        self.elsewhere[place] = 1
