"""What may be asked of a live run: one strict model a command, and how a request is read from bytes.

Nothing is guessed: an unknown key, a number as text, NaN, or one byte too many and the request is refused.
"""

import re
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from data_scheduler.config import SourceConfig, StrictModel
from data_scheduler.control import MAX_STEP, RefusedError

MAX_BYTES = 64 << 10
"""Of a request. A mixture of 1,000 sources takes 40 KB."""
ID = re.compile(r"[0-9a-z][0-9a-z-]{7,63}")
"""Names of requests, and so of their files."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
At = Annotated[str, Field(pattern=r"^\+?[0-9]{1,12}$")]
"""A step, "1200", or so many steps from now, "+200"."""


class SetMix(StrictModel):
    """Set the mixture; sources that are not named get none."""

    command: Literal["set-mix"]
    weights: Annotated[dict[Name, Annotated[Finite, Field(ge=0.0)]], Field(min_length=1)]
    at: At | None = None
    over: Annotated[int, Field(ge=2, le=10**9)] | None = None
    """Steps over which it is approached in equal parts."""


class SetPolicy(StrictModel):
    """Let a policy set the mixture."""

    command: Literal["set-policy"]
    kind: Name
    options: Annotated[dict[str, Any], Field(default_factory=dict)]
    at: At | None = None


class SetLrScale(StrictModel):
    """Multiply the schedule's learning rate."""

    command: Literal["set-lr-scale"]
    scale: Annotated[Finite, Field(ge=0.0, le=1000.0)]
    at: At | None = None


class SetEvalEvery(StrictModel):
    """Evaluate held-out data every so many steps."""

    command: Literal["set-eval-every"]
    every: Annotated[int, Field(ge=0, le=MAX_STEP)]


class SaveNow(StrictModel):
    """Write a checkpoint before the next step."""

    command: Literal["save-now"]


class StopAt(StrictModel):
    """Save and end once so many steps are done."""

    command: Literal["stop-at"]
    at: At


class Quarantine(StrictModel):
    """Draw nothing from a source, one of its files or one of its records any more."""

    command: Literal["quarantine"]
    source: Name
    file: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    record: Annotated[int, Field(ge=0, le=MAX_STEP)] | None = None
    within: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    """Bytes of the file's text that the record is counted in, where `headrace data trace` says so."""


class AddSource(StrictModel):
    """Let a source enter the run."""

    command: Literal["add-source"]
    source: SourceConfig


class Pause(StrictModel):
    """Wait before the next step."""

    command: Literal["pause"]


class Resume(StrictModel):
    """Go on after a pause."""

    command: Literal["resume"]


class Status(StrictModel):
    """Say where the run stands and what people have changed."""

    command: Literal["status"]


class Undo(StrictModel):
    """Take back what an event of the journal set, from now on."""

    command: Literal["undo"]
    event: Annotated[int, Field(ge=0, le=MAX_STEP)]


Command = (
    SetMix
    | SetPolicy
    | SetLrScale
    | SetEvalEvery
    | SaveNow
    | StopAt
    | Quarantine
    | AddSource
    | Pause
    | Resume
    | Status
    | Undo
)


class Request(StrictModel):
    """A command, and who asks for it and why."""

    id: Annotated[str, Field(pattern=rf"^{ID.pattern}$")]
    """Made by who asks; the same id again is the same request."""
    user: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@+-]+$", max_length=64)] = "unknown"
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$", max_length=255)] = "unknown"
    why: Annotated[str, Field(max_length=2000)] = ""
    """For people who read the journal."""
    ask: Annotated[Command, Field(discriminator="command")]

    @field_validator("why")
    @classmethod
    def _is_text(cls, why: str) -> str:
        if any(not (character.isprintable() or character == "\n") for character in why):
            raise ValueError("control characters are not text")
        return why


REQUEST = TypeAdapter(Request)


def read_request(content: bytes) -> Request:
    """The request in `content`. Raises RefusedError with the first thing that is wrong."""
    if len(content) > MAX_BYTES:
        raise RefusedError(f"a request has {MAX_BYTES} bytes at most")
    try:
        raw = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise RefusedError(f"not a JSON object: {error}") from None
    return make_request(raw)


def make_request(raw: Any) -> Request:
    """`raw` as a request. Raises RefusedError."""
    try:
        return REQUEST.validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # The place of the union's member in the path, e.g. ask.set-mix.weights, is the command's name: kept.
        where = ".".join(str(part) for part in first["loc"])[:200] or "request"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise RefusedError(f"{where}: {first['msg'].removeprefix('Value error, ')}{more}") from None


def new_id(time_ns: int, random: bytes) -> str:
    """An id that sorts by time."""
    return f"{time_ns:020d}-{random.hex()}"
