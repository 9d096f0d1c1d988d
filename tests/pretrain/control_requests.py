"""A request as clients send it, and a desk that hears it."""

import json
from typing import Any

from pretrain.control.request import Request

ID = "00000000-test"
PAUSE = {"id": ID, "ask": {"command": "pause"}}


def request(**changes: Any) -> bytes:
    return json.dumps(PAUSE | changes).encode()


class Desk:
    """Answers everything, and remembers it."""

    def __init__(self) -> None:
        self.heard: list[tuple[Request, str]] = []

    def hand(self, asked: Request, who: str, *rest: Any) -> None:
        self.heard.append((asked, who))
        rest[-1]({"id": asked.id, "status": "accepted", "event": len(self.heard), "step": 1, "kind": "paused"})
