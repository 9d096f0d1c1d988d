"""From a record's fields to its text: nested keys, templates, filters."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_scheduler import expression
from data_scheduler.bands import BandFilter, is_number
from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import MarkedText, Records, Versions
from data_scheduler.template import template_parts
from data_scheduler.transforms.config import PrefixTransform, TemplatesTransform
from headrace.errors import ConfigError

ROW = "__row__"
BIGGEST_EXACT = 2.0**63
"""JSON numbers from here on are read as floats."""


class Extractor:
    """Turns mappings into documents as a source's `text_key`, `template` and `where` say."""

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.name
        self.text_key = config.text_key
        self.parts = template_parts(config.template) if config.template else [("", config.text_key)]
        self.is_template = config.template is not None
        self.prompt = template_parts(config.prompt) if config.prompt else []
        self.masked_key, self.weight_key = config.masked_key, config.loss_weight_key
        self.is_marked = bool(self.prompt or self.masked_key or self.weight_key)
        self.templates = [
            (template_parts(one.prompt) if one.prompt else [], template_parts(one.template))
            for transform in config.transforms
            if isinstance(transform, TemplatesTransform)
            for one in transform.templates
        ]
        self.prefixes = [one.parts for one in config.transforms if isinstance(one, PrefixTransform)]
        has_fields = any(field for parts in self.prefixes for _, field in parts)
        self.is_versioned = bool(self.templates) or has_fields
        self.where: Any = None
        self.filter_fields: list[str] = []
        if config.where:
            self.where, self.filter_fields = expression.parse(config.where)
        self.band = None if config.band is None else BandFilter(config.band)
        ranked = [] if self.band is None or self.band.from_text else [self.band.by]
        texts = [part for prompt, parts in self.templates for part in prompt + parts] or self.parts
        texts = texts + [part for parts in self.prefixes for part in parts]
        fields = [field for _, field in texts + self.prompt] + [self.masked_key or "", self.weight_key or ""]
        self.columns = sorted(_roots([field for field in fields if field]) | _roots([*self.filter_fields, *ranked]))
        """Top-level fields needed; column formats read only these."""
        self.text_columns = sorted({field for _, field in texts if field} - {*self.filter_fields, *ranked})
        """Fields that are text whatever they look like, for formats whose types are guessed."""
        self.max_bytes = config.max_document_bytes
        self._refused: tuple[str, str] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a record's text is simply one top-level field."""
        return (
            self.where is None
            and self.band is None
            and not self.is_marked
            and not self.is_versioned
            and self.parts == [("", self.text_key)]
            and "." not in self.text_key
        )

    def add(self, rows: Sequence[Mapping[str, Any] | str | None], records: Records) -> None:
        """Add every row to `records` as document, reject or left out. A row that is a str is a reason to reject it, one
        that is None was left out before."""
        kept, unlike = self._filter(rows)
        for number, row in enumerate(rows):
            if isinstance(row, str):
                records.reject(row)
            elif row is None:
                records.leave_out()
            elif number in unlike:
                records.reject(unlike[number])
            elif kept is not None and number not in kept:
                records.leave_out()
            elif self._is_own(row, records):
                self._add_text(row, records)

    def add_bare(self, text: str, records: Records) -> None:
        """Add a text that has no fields besides."""
        if self._is_own({}, records):
            self.add_document(text, records)

    def too_long(self, size: int) -> str:
        """The reason to reject a record of `size` bytes or more."""
        return f"longer than max_document_bytes={self.max_bytes} ({size} bytes or more)"

    def refusing(self, mark: str, reason: str) -> "Extractor":
        """As this one, but texts that contain `mark` are rejected for `reason`."""
        other = copy.copy(self)
        other._refused = mark, reason
        return other

    def _is_refused(self, text: str) -> bool:
        return self._refused is not None and self._refused[0] in text

    def add_document(self, text: str, records: Records, marked: MarkedText | Versions | None = None) -> None:
        """Add a text (as `marked`, where given) as a document, or as a reject when it is too long."""
        own = self.band is not None
        if self.band is not None and self.band.from_text and not self.band.holds(len(text)):
            records.leave_to_others()
            return
        # A character is at most four bytes; only what may be too long is measured.
        if 4 * len(text) > self.max_bytes and (size := len(text.encode("utf-8", "surrogatepass"))) > self.max_bytes:
            records.reject(self.too_long(size), own)
        elif self._refused is not None and self._is_refused(text):
            records.reject(self._refused[1], own)
        else:
            records.documents.append(text if marked is None else marked)

    def _add_text(self, row: Mapping[str, Any], records: Records) -> None:
        marked: MarkedText | Versions | None
        try:
            if self.is_versioned:
                marked = self._versions(row)
                texts = [marked.choose(place).text for place in range(len(marked.choices))]
                text = max(texts, key=lambda each: (self._is_refused(each), len(each)))
            else:
                text = _fill(self.parts, row, self.is_template)
                marked = self._marked(text, row) if self.is_marked else None
        except _Unusable as problem:
            records.reject(str(problem), own=self.band is not None and not self.band.from_text)
        else:
            self.add_document(text, records, marked)

    def _is_own(self, row: Mapping[str, Any], records: Records) -> bool:
        """Whether a record may be this band's; adds it to `records` when it is another's or in none."""
        if self.band is None or self.band.from_text:
            return True
        value = lookup(row, self.band.by)
        if not is_number(value):
            records.reject(self.band.without(value))
        elif self.band.holds(value):
            return True
        else:
            records.leave_to_others()
        return False

    def _marked(self, text: str, row: Mapping[str, Any]) -> MarkedText:
        """The text with what carries no loss marked, and its weight. Raises _Unusable."""
        pieces = [(_fill(self.prompt, row, True), False)] if self.prompt else []
        at = 0
        for begin, end in _spans(row, self.masked_key, len(text)):
            pieces += [(text[at:begin], True), (text[begin:end], False)]
            at = end
        pieces.append((text[at:], True))
        return MarkedText(tuple(piece for piece in pieces if piece[0]), self._weight(row))

    def _versions(self, row: Mapping[str, Any]) -> Versions:
        """Every text that the record may become. Raises _Unusable."""
        prefixes = tuple(_fill(parts, row, True) for parts in self.prefixes)
        weight = self._weight(row)
        if not self.templates:
            marked = self._marked(_fill(self.parts, row, self.is_template), row)
            return Versions((tuple(((text,), learned) for text, learned in marked.pieces),), weight, prefixes)
        choices = []
        for prompt, parts in self.templates:
            pieces = [(tuple(_filled(prompt, row, True)), False)] if prompt else []
            choices.append((*pieces, (tuple(_filled(parts, row, True)), True)))
        return Versions(tuple(choices), weight, prefixes)

    def _weight(self, row: Mapping[str, Any]) -> float:
        """The record's weight in the loss. Raises _Unusable."""
        value = lookup(row, self.weight_key) if self.weight_key else None
        if value is None:
            return 1.0
        if _kind(value) != "a number" or not 0 <= value < math.inf:
            raise _Unusable(f"field {self.weight_key!r} is {value!r:.40}, not a weight from 0 on")
        return float(value)

    def _filter(self, rows: Sequence[Mapping[str, Any] | str | None]) -> tuple[set[int] | None, dict[int, str]]:
        """(numbers of the rows the filter keeps, None without a filter; reasons to reject rows of unlike types)."""
        unlike: dict[int, str] = {}
        if self.where is None:
            return None, unlike
        good = {number: row for number, row in enumerate(rows) if isinstance(row, Mapping)}
        for field in self.filter_fields:
            unlike |= _unlike(field, {number: lookup(row, field) for number, row in good.items()})
        numbers = [number for number in good if number not in unlike]
        table = {field: _array([lookup(good[number], field) for number in numbers]) for field in self.filter_fields}
        whole = pa.table(table | {ROW: pa.array(numbers, pa.int64())})
        try:
            return self._kept(whole), unlike
        except pa.ArrowInvalid:
            # Division by zero, overflow: the fault of single rows, so each is asked for itself.
            kept: set[int] = set()
            for place, number in enumerate(numbers):
                try:
                    kept |= self._kept(whole.slice(place, 1))
                except pa.ArrowInvalid as error:
                    unlike[number] = f"where: {str(error).splitlines()[0]}"
            return kept, unlike

    def _kept(self, table: pa.Table) -> set[int]:
        """Numbers of the rows for which the filter holds. Raises ConfigError when such kinds cannot be compared."""
        try:
            return set(table.filter(self.where)[ROW].to_pylist())
        except pa.ArrowNotImplementedError as error:
            raise ConfigError(f"source {self.name!r}: where: {str(error).splitlines()[0]}") from None


def _array(values: Sequence[Any]) -> pa.Array:
    """Values of one kind; numbers are floats where one of them is no 64-bit integer."""
    if any(isinstance(value, float) or (isinstance(value, int) and abs(value) >= BIGGEST_EXACT) for value in values):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array(values)


class _Unusable(Exception):
    """Why a record gives no document."""


def _fill(parts: Sequence[tuple[str, str]], row: Mapping[str, Any], numbers: bool) -> str:
    """The template's text. Numbers may stand in a template; alone they are no text. Raises _Unusable."""
    return "".join(_filled(parts, row, numbers))


def _filled(parts: Sequence[tuple[str, str]], row: Mapping[str, Any], numbers: bool) -> list[str]:
    """The pieces of `_fill`."""
    pieces = []
    for literal, field in parts:
        pieces.append(literal)
        if not field:
            continue
        value = lookup(row, field)
        if not (isinstance(value, str) or (numbers and _kind(value) == "a number")):
            raise _Unusable(f"field {field!r} is " + ("missing" if value is None else "not text"))
        if isinstance(value, float) and abs(value) >= BIGGEST_EXACT:
            raise _Unusable(f"field {field!r} is a number past 64 bits, whose digits are lost")
        pieces.append(str(value))
    return pieces


def _spans(row: Mapping[str, Any], key: str | None, length: int) -> list[tuple[int, int]]:
    """The record's masked stretches in order. Raises _Unusable when they are not ascending pairs within the text."""
    value = lookup(row, key) if key else None
    if value is None:
        return []
    spans = (
        [tuple(span) if isinstance(span, Sequence) else () for span in value] if isinstance(value, Sequence) else [()]
    )
    edges = [edge for span in spans for edge in span]
    numbers = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges)
    pairs = all(len(span) == 2 for span in spans)
    if not numbers or not pairs or edges != sorted(edges) or (edges and not 0 <= edges[0] <= edges[-1] <= length):
        raise _Unusable(f"field {key!r} is not a list of ascending [begin, end) pairs within the text")
    return [(begin, end) for begin, end in spans]


def lookup(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field; dots go into nested objects unless the whole name is a field itself."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _unlike(field: str, values: Mapping[int, Any]) -> dict[int, str]:
    """Reasons to reject rows whose value is of another kind than the first one's; numbers are one kind."""
    kinds = {number: _kind(value) for number, value in values.items() if value is not None}
    first = next(iter(kinds.values()), "")
    return {
        number: f"field {field!r} is {kind}, elsewhere {first}"
        for number, kind in kinds.items()
        if kind != first or kind == "nested"
    }


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "nested"


def _roots(fields: Sequence[str]) -> set[str]:
    return {field.split(".")[0] for field in fields}
