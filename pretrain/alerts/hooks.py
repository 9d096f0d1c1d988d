"""One attempt at delivering one message, by kind of hook. Standard library only.

    deliver({"kind": "webhook", "url": "http://127.0.0.1:8080/"}, message, os.environ, timeout_s=20.0)

A message: {"run", "event", "text", "step", "time", "host", "suppressed"}. What is wrong comes as an exception, whose
text may hold secrets: `problem` says it without.
"""

import json
import smtplib
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import EmailMessage
from typing import Any

SIGNS = {"run_finished": "✅", "run_stopped": "⏸"}
"""What a chat message begins with; all other events are bad."""


class NotDelivered(Exception):
    """An attempt failed; the text is safe to write down."""


def deliver(hook: Mapping[str, Any], message: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float) -> None:
    """Deliver `message` once, or raise NotDelivered."""
    try:
        _BY_KIND[hook["kind"]](hook, message, environ, timeout_s)
    except NotDelivered:
        raise
    except Exception as error:
        raise NotDelivered(problem(error)) from None


def problem(error: Exception) -> str:
    """What went wrong, without an address, header or password that the exception may quote."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code}"
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, Exception) else error
    if isinstance(error, smtplib.SMTPResponseException):
        return f"the mail server answered {error.smtp_code}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def line(message: Mapping[str, Any]) -> str:
    """A message in one line for people."""
    held = message["suppressed"]
    more = f" ({held} more of the kind since the last message)" if held else ""
    return f"{message['run']}: {message['event']} at step {message['step']}: {message['text']}{more}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, body: Any, headers: Mapping[str, str], timeout_s: float) -> None:
    if not url.startswith(("http://", "https://")):
        raise NotDelivered("the address in the environment is no http or https address")
    data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", "User-Agent": "headrace", **headers}, method="POST"
    )
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as answer:
        answer.read(1 << 16)


def _webhook(hook: Mapping[str, Any], message: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float) -> None:
    token = environ[hook["token_env"]] if hook.get("token_env") else ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    _post(hook.get("url") or environ[hook["url_env"]], dict(message), headers, timeout_s)


def _slack(hook: Mapping[str, Any], message: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float) -> None:
    text = line(message).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")  # Slack's whole escaping
    _post(environ[hook["url_env"]], {"text": f"{SIGNS.get(message['event'], '🚨')} {text}"}, {}, timeout_s)


def _email(hook: Mapping[str, Any], message: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float) -> None:
    mail = EmailMessage()
    mail["Subject"] = " ".join(f"[headrace] {message['run']}: {message['event']}".split())
    mail["From"], mail["To"] = hook["sender"], ", ".join(hook["to"])
    mail.set_content(f"{line(message)}\n\nhost {message['host']}\n{json.dumps(dict(message), ensure_ascii=False)}\n")
    context = ssl.create_default_context()
    if hook["security"] == "tls":
        server: smtplib.SMTP = smtplib.SMTP_SSL(hook["host"], hook["port"], timeout=timeout_s, context=context)
    else:
        server = smtplib.SMTP(hook["host"], hook["port"], timeout=timeout_s)
    with server:
        if hook["security"] == "starttls":
            server.starttls(context=context)
        if hook.get("user"):
            server.login(hook["user"], environ[hook["password_env"]])
        server.send_message(mail)


def _command(hook: Mapping[str, Any], message: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float) -> None:
    body = json.dumps(dict(message), ensure_ascii=False).encode("utf-8", "replace")
    quiet = subprocess.DEVNULL
    done = subprocess.run(hook["command"], input=body, stdout=quiet, stderr=quiet, timeout=timeout_s)
    if done.returncode:
        raise NotDelivered(f"the command ended with {done.returncode}")


_BY_KIND = {"webhook": _webhook, "slack": _slack, "email": _email, "command": _command}
