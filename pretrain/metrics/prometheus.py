"""A Prometheus endpoint: `GET /metrics` on `metrics.prometheus.host:port` while the run lives.

The newest record's values stand in a private registry, each with a label `run`, values of a source, layer or rank with
that too; names are in `registry`. `headrace_last_step_timestamp_seconds` says when the last step ended, so that

    time() - headrace_last_step_timestamp_seconds > 300

finds a run that hangs. Loopback needs no token. Any other address does: loss curves and source names are not for
everyone on the network, and the endpoint speaks plain HTTP, so put it behind a TLS proxy where others can listen in.
"""

import hmac
import ipaddress
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError
from pretrain.config import PrometheusConfig
from pretrain.metrics.registry import METRICS, Metric, Record, is_evaluation


class PrometheusSink:
    """Serves the newest values over HTTP from a thread of its own."""

    def __init__(self, config: PrometheusConfig, run_dir: Path, run_name: str) -> None:
        try:
            from prometheus_client import CollectorRegistry
            from prometheus_client.exposition import choose_encoder
        except ImportError:
            raise ConfigError(
                "metrics.prometheus.enabled: prometheus-client is not installed; `pip install 'headrace[train]'` or "
                "set it to false"
            ) from None
        check_address(config)
        self._values = _Values(run_name)
        registry = CollectorRegistry()
        registry.register(self._values)  # anything with collect() is a collector

        def expose(accept: str) -> tuple[bytes, str]:
            encoder, content_type = choose_encoder(accept)
            return encoder(registry), content_type

        try:
            self._server = _Server(config.host, config.port, config.token, expose)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"metrics.prometheus: cannot listen on {config.host} port {config.port} "
                f"({getattr(error, 'strerror', None) or error}); choose another host or port (port 0 takes a free one)"
            ) from None
        self.port: int = self._server.server_address[1]
        """Port in use."""
        self._port_file = run_dir / "log" / "prometheus.port"
        self._port_file.parent.mkdir(parents=True, exist_ok=True)
        new = self._port_file.with_suffix(".new")
        new.write_text(f"{self.port}\n")
        new.replace(self._port_file)
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Let the next scrape see `record`."""
        self._values.take(record)

    def close(self) -> None:
        """Stop listening."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._port_file.unlink(missing_ok=True)


def check_address(config: PrometheusConfig) -> None:
    """Raises ConfigError for an address that others can reach when no token protects it."""
    if config.token and not (config.token.isascii() and config.token.isprintable() and " " not in config.token):
        raise ConfigError("metrics.prometheus.token: use printable ASCII without spaces; it travels in an HTTP header")
    if not config.token and not _is_loopback(config.host):
        raise ConfigError(
            f"metrics.prometheus.host: {config.host!r} can be reached from other machines; set "
            "metrics.prometheus.token, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    """Whether every address `host` stands for is a loopback address; the empty host means all interfaces."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


class _Values:
    """The newest value of every exported metric, in the form prometheus_client collects."""

    def __init__(self, run_name: str) -> None:
        self._run = run_name
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = {}

    def take(self, record: Record) -> None:
        with self._lock:
            if is_evaluation(record):  # its step counts otherwise than a training record's
                record = {name: value for name, value in record.items() if name != "step"}
            for metric in METRICS:
                value = record.get(metric.name)
                if not metric.exported or value is None:
                    continue
                values = value if metric.label else {"": value}
                old = self._values.get(metric.name, {}) if metric.kind == "sum" else {}
                self._values[metric.name] = {**old, **{key: old.get(key, 0) + values[key] for key in values}}

    def collect(self) -> Iterator[Any]:
        """Metric families for one scrape."""

        with self._lock:
            for metric in METRICS:
                if metric.name in self._values:
                    yield self._family(metric)

    def _family(self, metric: Metric) -> Any:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
        text = f"{metric.meaning} ({metric.unit})"
        family = kind(metric.exported, text, labels=["run", metric.label] if metric.label else ["run"])
        for key, value in self._values[metric.name].items():
            family.add_metric([self._run, key] if metric.label else [self._run], float(value))
        return family


class _Server(ThreadingHTTPServer):
    """One thread a scrape, so that a scraper that stalls holds up nobody."""

    daemon_threads = True

    def __init__(self, host: str, port: int, token: str, expose: Any) -> None:
        self.address_family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
        self.expose = expose
        self._expected = f"Bearer {token}".encode() if token else None
        super().__init__((host, port), _Handler)

    def allows(self, header: str) -> bool:
        """Whether an Authorization header carries the token; compared in constant time."""
        return self._expected is None or hmac.compare_digest(header.encode("utf-8", "replace"), self._expected)

    def server_bind(self) -> None:
        """Bind without the base class's reverse look-up of the host name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10
    """Seconds a client may take to send its request."""
    server_version = "headrace"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            return self._answer(404, b"metrics are at /metrics\n", "text/plain")
        if not self.server.allows(self.headers.get("Authorization", "")):
            return self._answer(401, b"send the bearer token of metrics.prometheus.token\n", "text/plain")
        body, content_type = self.server.expose(self.headers.get("Accept", ""))
        return self._answer(200, body, content_type)

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is not worth a line each."""
