"""Who may see and ask what, before any page is asked for.

    no token     loopback only; the page can be read, nothing can be changed
    a token      every address but the page's own files wants it: `Authorization: Bearer …`, or the cookie that `POST
                 /api/login` gives for it; live runs can be changed

The cookie is an HMAC under a key of this process, so the token itself stays out of the browser's store, and a new start
of the dashboard ends every session. Where there is no token, a request must name a loopback address as its host:
another site's page cannot then reach the dashboard under a name of its own (DNS rebinding). Whatever changes something
must be JSON from this very page (`Origin`), so no other site can send it.
"""

import hashlib
import hmac
import ipaddress
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.errors import ConfigError

COOKIE: Final = "headrace_dashboard"
MIN_TOKEN: Final = 16
"""Characters; 32 random letters and digits cannot be guessed."""
LARGEST_BODY: Final = 64 << 10
LONGEST_QUERY: Final = 8 << 10
OPEN_PATHS: Final = ("/", "/app.js", "/app.css", "/favicon.svg", "/api/login", "/api/session")
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def check_address(host: str, token: str) -> None:
    """Raises ConfigError for an address that others can reach when no token protects it, and for a weak token."""
    if token and (len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token):
        raise ConfigError(f"dashboard token: use {MIN_TOKEN} or more printable ASCII characters without spaces")
    if not token and not is_loopback(host):
        raise ConfigError(
            f"dashboard: {host!r} can be reached from other machines; give a token (--token-file), or listen on "
            "127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is a loopback one without asking anybody; other names could resolve to anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """Lets a request through to `app`, or answers it."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()
        self._key = secrets.token_bytes(32)

    @property
    def has_token(self) -> bool:
        """Whether there is one, so that runs can be changed."""
        return bool(self._token)

    def session(self, token: str) -> str | None:
        """The cookie's value for whoever gives the right token; compared in constant time."""
        if not self._token or not hmac.compare_digest(token.encode("utf-8", "replace"), self._token):
            return None
        return self._session()

    def knows(self, headers: Headers) -> bool:
        """Whether a request carries the token, or the cookie that stands for it."""
        if not self._token:
            return True
        given = headers.get("authorization", "").encode("utf-8", "replace")
        if given:
            return hmac.compare_digest(given, b"Bearer " + self._token)
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._session().encode())

    def _session(self) -> str:
        return hmac.new(self._key, b"session", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on; every answer gets the security headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._token and not is_loopback(_name(host)):
            return _say(421, "without a token the dashboard answers on loopback addresses only")
        if len(scope["query_string"]) > LONGEST_QUERY:
            return _say(414, "the question is too long")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or len(length) > 9 or int(length) > LARGEST_BODY:
            return _say(413, f"a request has {LARGEST_BODY} bytes at most")
        if "transfer-encoding" in headers:
            return _say(411, "send Content-Length")
        if scope["method"] == "POST":
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return _say(415, "send application/json")
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                return _say(403, "another site's page may not ask this")
        elif scope["method"] not in ("GET", "HEAD"):
            return _say(405, "GET or POST")
        if scope["path"] not in OPEN_PATHS and not self.knows(headers):
            return _say(401, "give the dashboard's token")
        return None


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _say(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
