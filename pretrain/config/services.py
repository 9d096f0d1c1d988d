"""What a run tells and hears: the `metrics`, `control` and `monitor` sections."""

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegative


class WandbConfig(StrictModel):
    enabled: bool = False
    project: str = "headrace"
    mode: Literal["online", "offline"] = "offline"


class PrometheusConfig(StrictModel):
    enabled: bool = False
    host: str = "127.0.0.1"
    """Address to listen on; any address besides loopback needs `token`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9401
    """0 takes a free port; the port in use is written to `<run>/log/prometheus.port`."""
    token: str = ""
    """Bearer token a scraper must send; empty: none needed (loopback only)."""


class DynamicsConfig(StrictModel):
    """Numbers from inside the model: attention logits, norms of queries and block outputs, weights, gradients and
    updates by layer, gradient-noise scale."""

    every: NonNegative = 0
    """Measure every so many steps, from step 0 on; 0: never. Steps in between cost nothing more."""


class MetricsConfig(StrictModel):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False
    prometheus: PrometheusConfig = PrometheusConfig()
    progress: bool = True
    """Progress bar on a terminal, plain lines elsewhere."""
    dynamics: DynamicsConfig = DynamicsConfig()
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """FLOP/s of one device, which `mfu` is a share of; null: dense bf16 of the GPU's data sheet. On other devices there
    is no `mfu` without it."""
    ranks_every: NonNegative = 100
    """Record each rank's data wait and memory every so many steps, from step 0 on; 0: never. `metrics.jsonl` and
    Prometheus only."""


class ControlConfig(StrictModel):
    """How a live run takes commands over HTTP; command files in the run folder are always taken."""

    http: bool = False
    """Listen for commands on rank 0; the address in use is written to `<run>/control/endpoint.json`."""
    address: str = "127.0.0.1"
    """Address to listen on; any address besides loopback needs `token_file`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 takes a free port."""
    token_file: str | None = None
    """File with the token that commands must send, readable by its owner only; on loopback a token is made when none is
    given."""
    tls_cert: str | None = None
    """Certificate chain in PEM; with `tls_key` the endpoint speaks HTTPS."""
    tls_key: str | None = None
    """Private key of `tls_cert`, in PEM."""

    @model_validator(mode="after")
    def _others_need_a_token(self) -> "ControlConfig":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both or none")
        if self.http and self.token_file is None and not _is_loopback(self.address):
            raise ValueError(
                f"address {self.address!r} can be reached from other machines; set token_file, or listen on 127.0.0.1"
            )
        return self


class MonitorConfig(StrictModel):
    """A page in the browser that shows the run while it trains."""

    dashboard: bool = False
    """Start it with the run, as a process of its own on rank 0's machine that ends with the run; its address is written
    to `<run>/log/dashboard.log`."""
    address: str = "127.0.0.1"
    """Address to listen on; any address besides loopback needs `token_file`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8420
    """0 takes a free port."""
    token_file: str | None = None
    """File with the token that viewers must give, readable by its owner only; with one the run can be changed from the
    page."""

    @model_validator(mode="after")
    def _others_need_a_token(self) -> "MonitorConfig":
        if self.dashboard and self.token_file is None and not _is_loopback(self.address):
            raise ValueError(
                f"address {self.address!r} can be reached from other machines; set token_file, or listen on 127.0.0.1"
            )
        return self


def _is_loopback(address: str) -> bool:
    """Whether an address is a loopback one without asking anybody; other names could resolve to anything."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
