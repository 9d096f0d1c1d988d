"""The other end: how a command is put to a run and its answer waited for, by file or over HTTP."""

import getpass
import json
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

import orjson

from headrace.errors import ConfigError, UnreachableError
from pretrain.control.inbox import Folder, put_file
from pretrain.control.request import make_request, new_id
from pretrain.control.server import read_token

LOOK_S = 0.05
"""Between two looks for an answer."""
MOST_ANSWER_BYTES = 1 << 20
STATUSES = ("accepted", "ok", "refused", "waiting")
Answer = dict[str, Any]


class Way(Protocol):
    """How a request reaches the run."""

    def send(self, request: dict[str, Any], timeout_s: float) -> Answer:
        """The answer. Raises UnreachableError when none comes, ConfigError when the run cannot be asked."""
        ...


def ask(way: Way, command: dict[str, Any], why: str, timeout_s: float) -> Answer:
    """Put `command` to the run as the user of this process. Raises ConfigError when it cannot be one."""
    request = {
        "id": new_id(time.time_ns(), os.urandom(8)),
        "user": re.sub(r"[^A-Za-z0-9_.@+-]", "_", _user())[:64],
        "host": re.sub(r"[^A-Za-z0-9_.:-]", "_", socket.gethostname())[:255] or "unknown",
        "why": why,
        "ask": command,
    }
    make_request(request)  # what the run would refuse is refused at once
    return way.send(request, timeout_s)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in containers
        return f"uid-{os.getuid()}"


class ByFile:
    """Through the run folder."""

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError when `run_dir` is no run's folder."""
        self._folder, self._run_dir = Folder(run_dir), run_dir
        if not (run_dir / "journal.jsonl").exists():
            raise ConfigError(f"{run_dir}: no journal.jsonl there; give a run folder, or the URL of its endpoint")
        try:
            self._folder.create()  # a run that is just starting has not made it yet
        except OSError as error:
            raise ConfigError(f"{self._folder.path}: {error.strerror}; you may not command this run") from None

    def send(self, request: dict[str, Any], timeout_s: float) -> Answer:
        """As in `Way`. A request that nobody has taken when the time is over is withdrawn."""
        name = f"{request['id']}.json"
        try:
            put_file(self._folder.inbox, name, orjson.dumps(request))
        except PermissionError:
            raise ConfigError(
                f"{self._folder.inbox}: you may not write there, so you may not command this run"
            ) from None
        try:
            answer = self._wait(name, time.monotonic() + timeout_s)
            if answer is None:
                answer = self._withdraw(name, timeout_s)
        except BaseException:  # Ctrl-C too: nothing may be carried out that nobody waits for
            self._remove(name)
            raise
        return answer

    def _wait(self, name: str, deadline: float) -> Answer | None:
        path = self._folder.answers / name
        while True:
            if path.exists():
                answer: Answer = orjson.loads(path.read_bytes())
                path.unlink(missing_ok=True)
                return answer
            if time.monotonic() >= deadline:
                return None
            time.sleep(LOOK_S)

    def _withdraw(self, name: str, timeout_s: float) -> Answer:
        if self._remove(name):
            raise UnreachableError(
                f"{self._run_dir}: no answer in {timeout_s:g} s, so the command was withdrawn and nothing is changed; "
                "is the run alive?"
            )
        # Taken: it may be answered at this very moment.
        answer = self._wait(name, time.monotonic() + 1.0)
        if answer is None:
            raise UnreachableError(
                f"{self._run_dir}: the run has taken the command but not answered in {timeout_s:g} s; it will be "
                f"carried out between two steps, or when the run is started again (control/taken/{name})"
            )
        return answer

    def _remove(self, name: str) -> bool:
        try:
            (self._folder.inbox / name).unlink()
        except OSError:
            return False
        return True


class ByHttp:
    """Through the endpoint on rank 0."""

    def __init__(self, url: str, token: str, ca: Path | None = None) -> None:
        """Raises ConfigError for a URL or certificates that cannot be used."""
        if not re.match(r"https?://[^/]+/?$", url):
            raise ConfigError(f"{url}: give http://host:port or https://host:port")
        self._url, self._token = url.rstrip("/"), token
        try:
            context = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{ca}: not certificates in PEM: {error}") from None
        # No proxies: the token goes to the run and nobody else. No redirects, for the same reason.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _NoRedirect()
        )

    @classmethod
    def of_run(cls, run_dir: Path, ca: Path | None = None) -> "ByHttp":
        """The endpoint of a run in a folder that this machine sees. Raises ConfigError."""
        path = run_dir / "control" / "endpoint.json"
        try:
            found = json.loads(path.read_text())
            token = found["token"] if "token" in found else read_token(found["token_file"])
            return cls(found["url"], token, ca)
        except FileNotFoundError:
            raise ConfigError(f"{path} is not there: the run is not alive, or control.http is false") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not an endpoint'}") from None

    def send(self, request: dict[str, Any], timeout_s: float) -> Answer:
        """As in `Way`. An answer that does not come in time is asked for again under the same id."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            answer = self._post(request, min(30, int(left)))
            if answer.get("status") != "waiting":
                return answer
            if left <= 0:
                raise UnreachableError(
                    f"{self._url}: no answer in {timeout_s:g} s; the command waits and will be carried out between two "
                    "steps"
                )

    def _post(self, request: dict[str, Any], wait_s: int) -> Answer:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        url = f"{self._url}/commands?wait={wait_s}"
        sent = urllib.request.Request(url, orjson.dumps(request), headers, method="POST")
        try:
            try:
                with self._opener.open(sent, timeout=wait_s + 15) as reply:
                    return self._read(reply)
            except urllib.error.HTTPError as error:
                with error:
                    answer = self._read(error)
                if error.code == 409:
                    return answer
                raise ConfigError(f"{self._url}: {answer.get('reason', error.code)}") from None
        except (OSError, HTTPException, ValueError) as error:  # also an answer that was cut short
            raise UnreachableError(
                f"{self._url}: {getattr(error, 'reason', error)}; if the run ended before it answered, `status` or its "
                "journal says whether the command was taken"
            ) from None

    def _read(self, reply: Any) -> Answer:
        """The answer; raises ValueError when it is none."""
        answer = orjson.loads(reply.read(MOST_ANSWER_BYTES))
        if not isinstance(answer, dict) or answer.get("status") not in STATUSES:
            raise ValueError("not an answer of a run")
        return answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Never: urllib then raises the answer as an HTTPError."""
