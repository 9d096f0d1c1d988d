"""Commands over HTTP: `POST /commands` with a JSON object, answered once the run has decided between two steps.

    POST /commands   Authorization: Bearer <token>, Content-Type: application/json, a `request.Request`
      200 accepted, or what `status` tells     409 refused, with the reason
      202 not decided within `?wait=` seconds (default 30): ask again with the same id
      400 not HTTP we take   401 no token or a wrong one   404, 405, 411, 413 larger than 64 KiB, 415, 503 too many

The address in use, and on loopback a token made for this start, are in `<run>/control/endpoint.json`, which only the
run's owner can read. Any other address needs `control.token_file`. Without TLS files the endpoint speaks plain HTTP:
put it behind a proxy where others can listen in.
"""

import contextlib
import hmac
import json
import os
import secrets
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from data_scheduler.control import RefusedError
from headrace.errors import ConfigError
from pretrain.config import ControlConfig
from pretrain.control.inbox import put_file
from pretrain.control.request import MAX_BYTES, Request, read_request

CONNECTIONS = 32
"""At once; each is a thread. More are turned away."""
MIN_TOKEN = 16
"""Characters; 32 random letters and digits cannot be guessed."""
Hand = Callable[[Request, str, str, Callable[[dict[str, Any]], None]], None]


class Server:
    """The endpoint, from a thread of its own."""

    def __init__(self, config: ControlConfig, folder: Path, hand: Hand) -> None:
        """Listen. Raises ConfigError for an address, a token file or TLS files that cannot be used."""
        token = read_token(config.token_file) if config.token_file else secrets.token_urlsafe(32)
        tls = _tls(config)
        try:
            self._server = _Listener(config.address, config.port, token, tls, hand)
        except (OSError, UnicodeError, OverflowError) as error:
            raise ConfigError(
                f"control: cannot listen on {config.address} port {config.port} "
                f"({getattr(error, 'strerror', None) or error}); choose another address or port (0 takes a free one)"
            ) from None
        host, self.port = self._server.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        self.url = f"{'https' if tls else 'http'}://{shown}:{self.port}"
        self._file = folder / "endpoint.json"
        content: dict[str, Any] = {"url": self.url, "pid": os.getpid(), "host": socket.gethostname()}
        # A token of the user's stays in the user's file.
        content |= {"token_file": os.path.abspath(config.token_file)} if config.token_file else {"token": token}
        folder.mkdir(parents=True, exist_ok=True)
        put_file(folder, self._file.name, json.dumps(content).encode() + b"\n", 0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, name="headrace-control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._file.unlink(missing_ok=True)


def read_token(path: str) -> str:
    """The token in a file that nobody else can read. Raises ConfigError."""
    file = Path(path).expanduser()
    try:
        mode, token = file.stat().st_mode, file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"control.token_file: {path}: {getattr(error, 'strerror', None) or 'not ASCII'}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"control.token_file: {path} can be read by others; chmod 600 it")
    if len(token) < MIN_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(f"control.token_file: {path}: one line of {MIN_TOKEN} or more printable characters, no space")
    return token


def _tls(config: ControlConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"control.tls_cert, control.tls_key: {error.strerror or error}") from None
    return context


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, token: str, tls: ssl.SSLContext | None, hand: Hand) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._token, self.tls, self.hand = token.encode(), tls, hand
        self._free = threading.Semaphore(CONNECTIONS)
        super().__init__((host, port), _Handler)

    def allows(self, header: str) -> bool:
        """Whether an Authorization header carries the token; compared in constant time."""
        return hmac.compare_digest(header.encode("utf-8", "replace"), b"Bearer " + self._token)

    def server_bind(self) -> None:
        """Bind without the base class's reverse look-up of the host name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away or does not speak TLS is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 10
    """Seconds a client may take to send its request."""
    server_version = "headrace"
    sys_version = ""

    def setup(self) -> None:
        if self.server.tls is not None:  # here, in the connection's own thread: a slow handshake holds up nobody
            self.request.settimeout(self.timeout)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        if self.server.tls is not None:
            self.request.close()

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        if not self.server.allows(self.headers.get("Authorization", "")):
            return self._say(401, "send the token of <run>/control/endpoint.json, or of control.token_file, as Bearer")
        if url.path != "/commands":
            return self._say(404, "commands go to /commands")
        if self.headers.get_content_type() != "application/json":
            return self._say(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            return self._say(411, "send Content-Length")
        if len(length) > 9 or int(length) > MAX_BYTES:
            return self._say(413, f"a request has {MAX_BYTES} bytes at most")
        wait = parse_qs(url.query).get("wait", ["30"])[0]
        if not (wait.isascii() and wait.isdecimal() and len(wait) < 4):
            return self._say(400, "wait: whole seconds below 1000")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            return self._say(400, "the request ends too early")
        try:
            request = read_request(content)
        except RefusedError as error:
            return self._answer(409, {"status": "refused", "reason": str(error)})
        found: list[dict[str, Any]] = []
        answered = threading.Event()

        def answer(given: dict[str, Any]) -> None:
            found.append(given)
            answered.set()

        self.server.hand(request, f"{request.user}@{request.host}", f"http {self.client_address[0]}", answer)
        if not answered.wait(int(wait)):
            return self._answer(202, {"id": request.id, "status": "waiting"})
        return self._answer(409 if found[0]["status"] == "refused" else 200, found[0])

    def do_GET(self) -> None:
        if not self.server.allows(self.headers.get("Authorization", "")):
            return self._say(401, "send the token as Bearer")
        return self._say(405, "POST to /commands")

    def _say(self, status: int, text: str) -> None:
        self._answer(status, {"status": "refused", "reason": text})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode() + b"\n"
        self.close_connection = True
        with contextlib.suppress(OSError):  # whoever asked has gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The journal says who asked for what."""
