"""The Prometheus endpoint, scraped over real HTTP."""

import http.client
import math
import socket
import threading
from pathlib import Path

import pytest

from headrace.errors import ConfigError
from pretrain.config import PrometheusConfig

parser = pytest.importorskip("prometheus_client.parser")

from pretrain.metrics.prometheus import PrometheusSink, check_address  # noqa: E402

RECORD = {
    "step": 4,
    "tokens": 20480,
    "loss": 5.25,
    "grad_norm": 1.5,
    "lr": 3e-4,
    "tokens_per_s": 1234.5,
    "data_wait_s": 0.001,
    "batch_sha256": "ab" * 32,
    "time": 1.7e9,
    "source_loss": {"code": 5.0, 'o"d\\d\nname': 5.5},
    "source_tokens": {"code": 3000, 'o"d\\d\nname': 1096},
}


@pytest.fixture
def start(tmp_path: Path):
    sinks = []

    def start_(**options) -> PrometheusSink:
        sinks.append(PrometheusSink(PrometheusConfig(enabled=True, port=0, **options), tmp_path, "demo"))
        return sinks[-1]

    yield start_
    for sink in sinks:
        sink.close()


def get(port: int, path: str = "/metrics", host: str = "127.0.0.1", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=20)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


def scrape(port: int, **headers: str) -> dict[tuple, float]:
    status, body = get(port, **headers)
    assert status == 200
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(body)
        for sample in family.samples
    }


def test_a_scrape_sees_the_newest_values(start, tmp_path: Path) -> None:
    sink = start()
    assert (tmp_path / "log" / "prometheus.port").read_text() == f"{sink.port}\n"
    assert scrape(sink.port) == {}
    sink.write({**RECORD, "step": 3, "loss": 9.0})
    sink.write(RECORD)
    sink.write({"step": 5, "val_loss": {"code": 4.5}})
    run = ("run", "demo")
    samples = scrape(sink.port)
    odd = ("source", 'o"d\\d\nname')
    assert samples == {
        ("headrace_step", run): 4,
        ("headrace_last_step_timestamp_seconds", run): 1.7e9,
        ("headrace_tokens_total", run): 20480,
        ("headrace_loss", run): 5.25,
        ("headrace_grad_norm", run): 1.5,
        ("headrace_learning_rate", run): 3e-4,
        ("headrace_tokens_per_second", run): 1234.5,
        ("headrace_data_wait_seconds", run): 0.001,
        ("headrace_source_loss", run, ("source", "code")): 5.0,
        ("headrace_source_loss", run, odd): 5.5,
        ("headrace_source_tokens_total", run, ("source", "code")): 6000,  # an amount per step: summed
        ("headrace_source_tokens_total", run, odd): 2192,
        ("headrace_val_loss", run, ("source", "code")): 4.5,
    }


def test_a_loss_that_is_not_a_number_can_be_alerted_on(start) -> None:
    sink = start()
    sink.write({**RECORD, "loss": math.nan})
    assert math.isnan(scrape(sink.port)[("headrace_loss", ("run", "demo"))])


def test_the_token_is_required(start) -> None:
    sink = start(token="s3cret")
    assert get(sink.port)[0] == 401
    for wrong in ("Bearer", "Bearer s3cre", "Bearer s3cret2", "s3cret", "Basic s3cret", "Bearer é"):
        assert get(sink.port, Authorization=wrong.encode("utf-8").decode("latin-1"))[0] == 401
    assert get(sink.port, Authorization="Bearer s3cret")[0] == 200


def test_other_paths_are_not_found(start) -> None:
    sink = start()
    assert get(sink.port, "/")[0] == 404
    assert get(sink.port, "/metrics?name[]=x")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "no-such-host.invalid"])
def test_an_address_others_can_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.prometheus\.token"):
        check_address(PrometheusConfig(host=host))
    check_address(PrometheusConfig(host=host, token="x"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.10"])
def test_loopback_needs_none(host: str) -> None:
    check_address(PrometheusConfig(host=host))


@pytest.mark.parametrize("token", ["a b", "a\nb", "é"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        check_address(PrometheusConfig(token=token))


def test_an_open_address_serves_with_its_token(start) -> None:
    sink = start(host="0.0.0.0", token="t")
    assert get(sink.port)[0] == 401
    assert get(sink.port, Authorization="Bearer t")[0] == 200


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*in use.*port 0"):
            PrometheusSink(PrometheusConfig(enabled=True, port=port), tmp_path, "demo")


def test_a_client_that_stalls_holds_up_nobody(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.metrics.prometheus._Handler.timeout", 600)
    sink = start()
    sink.write(RECORD)
    with socket.create_connection(("127.0.0.1", sink.port)) as stalled:
        stalled.sendall(b"GET /metr")
        assert scrape(sink.port)  # gives up after 20 s


def test_scrapes_while_records_come(start) -> None:
    sink = start()
    stop = threading.Event()

    def write() -> None:
        step = 0
        while not stop.is_set():
            sink.write({**RECORD, "step": step, "tokens": step * 10, "source_loss": {f"s{step % 7}": 1.0}})
            step += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            samples = scrape(sink.port)
            if samples:  # one record's values stand together
                assert (
                    samples[("headrace_tokens_total", ("run", "demo"))]
                    == 10 * samples[("headrace_step", ("run", "demo"))]
                )
    finally:
        stop.set()
        writer.join()


def test_closing_frees_the_port(start, tmp_path: Path) -> None:
    sink = start()
    sink.close()
    sink.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", sink.port))
    assert not (tmp_path / "log" / "prometheus.port").exists()
