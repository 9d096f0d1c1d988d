"""Whom a run tells that something happened: the `alerts` section."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegativeFloat, PositiveFloat

EventName = Literal[
    "loss_spike", "not_finite", "rollback", "stall", "checkpoint_failed", "run_finished", "run_stopped", "run_failed"
]
EVENTS: tuple[EventName, ...] = (
    "loss_spike",
    "not_finite",
    "rollback",
    "stall",
    "checkpoint_failed",
    "run_finished",
    "run_failed",
)
"""What a hook hears of unless it says otherwise: everything but that a signal has ended the run, which schedulers do
several times a day."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable; what it holds never enters the run folder."""
Text = Annotated[str, Field(min_length=1)]


class Hook(StrictModel):
    events: Annotated[list[EventName], Field(min_length=1)] = list(EVENTS)
    """What it is told of."""


class WebhookHook(Hook):
    """POSTs JSON: `run`, `event`, `text`, `step`, `time`, `host`, `suppressed`."""

    kind: Literal["webhook"]
    url: str = ""
    """Address, when it is no secret."""
    url_env: Variable | None = None
    """Variable that holds the address, when it is one."""
    token_env: Variable | None = None
    """Variable that holds a token, sent as `Authorization: Bearer`."""

    @model_validator(mode="after")
    def _one_address(self) -> "WebhookHook":
        if bool(self.url) == (self.url_env is not None):
            raise ValueError("give one of url and url_env")
        if self.url:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"url: {self.url!r} is no http or https address")
            if parts.username or parts.password or parts.query:
                raise ValueError("url: it would stand in the run's configuration with its secret; use url_env")
        return self


class SlackHook(Hook):
    """Posts to a Slack channel, or to anything else that takes Slack's incoming webhooks (Mattermost, Discord's
    `/slack`)."""

    kind: Literal["slack"]
    url_env: Variable = "HEADRACE_SLACK_URL"
    """Variable that holds the incoming webhook's address, which is a secret."""


class EmailHook(Hook):
    """Sends a mail over SMTP."""

    kind: Literal["email"]
    host: Text
    """Mail server."""
    port: Annotated[int, Field(ge=1, le=65535)] = 587
    security: Literal["starttls", "tls", "none"] = "starttls"
    """`none` is refused with a password."""
    sender: Text
    to: Annotated[list[Text], Field(min_length=1)]
    user: str = ""
    """Name to log in with; empty: no log-in."""
    password_env: Variable | None = None
    """Variable that holds the password."""

    @model_validator(mode="after")
    def _log_in_is_whole_and_safe(self) -> "EmailHook":
        if bool(self.user) != (self.password_env is not None):
            raise ValueError("user and password_env belong together: give both or none")
        if self.user and self.security == "none":
            raise ValueError("security: none would send the password in the clear; use starttls or tls")
        if any("\n" in address or "\r" in address for address in (self.sender, *self.to)):
            raise ValueError("an address is one line")
        return self


class CommandHook(Hook):
    """Runs a program, the event as JSON on its standard input; no shell takes part. It failed when its exit code is not
    0."""

    kind: Literal["command"]
    command: Annotated[list[Text], Field(min_length=1)]
    """The program and its arguments, e.g. `[notify-send, headrace]`."""


AnyHook = Annotated[WebhookHook | SlackHook | EmailHook | CommandHook, Field(discriminator="kind")]


class AlertsConfig(StrictModel):
    """Messages to people, sent by a process of its own that can neither slow nor stop the training."""

    hooks: list[AnyHook] = []
    """Where they go; none: nothing is sent."""
    stall_s: NonNegativeFloat = 600.0
    """`stall`: no step and no evaluation ended for so long (a pause counts too); 0: never."""
    repeat_s: NonNegativeFloat = 3600.0
    """The same event is sent once in so long, restarts of the run included; the next message says how many were held
    back. `run_finished` is always sent."""
    timeout_s: PositiveFloat = 20.0
    """One attempt at delivery may take so long."""
    retry_s: PositiveFloat = 1.0
    """Pause after a failed attempt; it doubles with each, up to 5 minutes, for an hour."""
    linger_s: NonNegativeFloat = 10.0
    """When the run ends it waits so long for what is still to be delivered."""
