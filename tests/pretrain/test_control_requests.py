"""What a request may say; any other bytes are refused in one line."""

import contextlib

import pytest
from control_requests import ID, request
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler.control import RefusedError
from pretrain.control.request import MAX_BYTES, Request, read_request

MIX = {"command": "set-mix", "weights": {"a": 1.0}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a JSON object"),
        (b"[]", "request"),
        (b"\xff\xfe{}", "not a JSON object"),
        (b"[" * 50_000, "not a JSON object"),
        (b'{"a":1}' + b" " * MAX_BYTES, "bytes at most"),
        (request(more=1), "more: Extra inputs"),
        (request(id="short"), "id"),
        (request(id="../../etc/passwd"), "id"),
        (request(id=ID + "\n"), "id"),
        (request(user="root\n"), "user"),
        (request(user="a:b"), "user"),
        (request(why="x" * 2001), "why"),
        (request(why="\x1b[2J"), "control characters"),
        (request(ask={"command": "rm"}), "ask"),
        (request(ask={"command": "pause", "now": True}), "Extra inputs"),
        (request(ask=MIX | {"weights": {}}), "weights"),
        (request(ask=MIX | {"weights": {"a": "1"}}), "weights"),
        (request(ask=MIX | {"weights": {"a": -1}}), "weights"),
        (request(ask=MIX | {"weights": {"a/b": 1.0}}), "weights"),
        (request(ask=MIX | {"over": 1}), "over"),
        (request(ask=MIX | {"at": "-5"}), "at"),
        (request(ask=MIX | {"at": "٣"}), "at"),
        (request(ask=MIX | {"at": 5}), "at"),
        (request(ask=MIX).replace(b"1.0", b"NaN"), "not a JSON object"),
        (request(ask=MIX).replace(b"1.0", b"1e999"), ""),
        (request(ask={"command": "set-lr-scale", "scale": True}), "scale"),
        (request(ask={"command": "undo", "event": 10**30}), "event"),
        (request(ask={"command": "undo", "event": 1.0}), "event"),
        (request(ask={"command": "add-source", "source": {"name": "../x", "paths": ["x"]}}), "name"),
        (request(ask={"command": "add-source", "source": {"name": "x", "paths": [], "evil": 1}}), "source"),
    ],
)
def test_a_request_that_is_not_one_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason) as caught:
        read_request(content)
    assert len(str(caught.value)) < 500


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=300) | st.integers(0, 120).flatmap(lambda at: st.binary(max_size=3).map(lambda b: mixed(at, b)))
)
def test_any_bytes_are_a_request_or_refused(content: bytes) -> None:
    with contextlib.suppress(RefusedError):
        assert isinstance(read_request(content), Request)


def mixed(at: int, junk: bytes) -> bytes:
    whole = request(ask=MIX)
    return whole[:at] + junk + whole[at + len(junk) :]
