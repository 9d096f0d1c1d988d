"""The control endpoint, met with what nobody should send: tokens, silence, requests that are cut short, addresses."""

import http.client
import json
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_requests import Desk, request

from headrace.errors import ConfigError, UnreachableError
from pretrain.config import ControlConfig, load_config
from pretrain.control import server as server_module
from pretrain.control.client import ByHttp, ask
from pretrain.control.request import MAX_BYTES
from pretrain.control.server import Server, read_token


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(hand: Any = None, **changes: Any) -> Server:
        made.append(Server(ControlConfig(http=True, **changes), tmp_path / "control", hand or Desk().hand))
        return made[-1]

    yield start
    for server in made:
        server.stop()


def token_of(tmp_path: Path) -> str:
    return str(json.loads((tmp_path / "control" / "endpoint.json").read_text())["token"])


def post(server: Server, token: str | None, body: bytes = request(), **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    sent = {"Content-Type": "application/json"} | headers
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    connection.request("POST", "/commands", body, sent)
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    return reply.status, answer


def test_the_endpoint_takes_the_token_it_wrote_for_the_owner_alone(serve: Any, tmp_path: Path) -> None:
    desk = Desk()
    server = serve(desk.hand)
    path = tmp_path / "control" / "endpoint.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["url"] == server.url
    token = token_of(tmp_path)
    assert post(server, token)[0] == 200
    for wrong in (None, "", "x", token[:-1], token + "x", token.upper()):
        status, answer = post(server, wrong)
        assert status == 401
        assert token not in json.dumps(answer)
    assert post(server, "é".encode().decode("latin-1"))[0] == 401
    assert len(desk.heard) == 1
    server.stop()
    assert not path.exists()
    serve()
    assert token_of(tmp_path) != token


def test_the_token_is_compared_in_constant_time(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = server_module.hmac.compare_digest
    monkeypatch.setattr(server_module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or original(a, b))
    server = serve()
    assert post(server, "wrong")[0] == 401
    assert compared == [(b"Bearer wrong", b"Bearer " + token_of(tmp_path).encode())]


def test_what_is_not_a_command_is_turned_away(serve: Any, tmp_path: Path) -> None:
    desk = Desk()
    server = serve(desk.hand)
    token = token_of(tmp_path)
    assert post(server, token, b"x" * (MAX_BYTES + 1))[0] == 413
    assert post(server, token, request(), **{"Content-Length": "-1"})[0] == 411
    assert post(server, token, request(), **{"Content-Length": "9" * 30})[0] == 413
    assert post(server, token, request(), **{"Content-Type": "text/plain"})[0] == 415
    status, answer = post(server, token, b'{"half": ')
    assert (status, answer["status"]) == (409, "refused")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for method, path, expected in (("GET", "/commands", 405), ("POST", "/", 404), ("DELETE", "/commands", 501)):
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"})
        reply = connection.getresponse()
        reply.read()
        assert reply.status == expected
    assert desk.heard == []


def test_connections_that_say_nothing_do_not_keep_others_out_for_long(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module._Handler, "timeout", 0.2)
    server = serve()
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    deadline = time.monotonic() + 20
    status = 0
    while status != 200 and time.monotonic() < deadline:
        try:
            status, _ = post(server, token_of(tmp_path))
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
    assert status == 200
    for one in silent:
        one.close()


def test_an_undecided_command_is_asked_for_again_under_its_id(serve: Any, tmp_path: Path) -> None:
    heard: list[Any] = []
    serve(lambda *arguments: heard.append(arguments))
    (tmp_path / "journal.jsonl").touch()
    way = ByHttp.of_run(tmp_path)
    with pytest.raises(UnreachableError, match="the command waits"):
        ask(way, {"command": "pause"}, "", 1.5)
    assert len({arguments[0].id for arguments in heard}) == 1 < len(heard)


def test_the_client_says_when_the_run_is_gone(serve: Any, tmp_path: Path) -> None:
    server = serve()
    way = ByHttp.of_run(tmp_path)
    server.stop()
    with pytest.raises(UnreachableError, match="its journal says whether"):
        ask(way, {"command": "pause"}, "", 1.0)
    with pytest.raises(ConfigError, match=r"control\.http is false"):
        ByHttp.of_run(tmp_path)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"junk\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{",
        b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_an_answer_that_is_cut_short_is_none(reply: bytes) -> None:
    """As of a run that is killed while it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        peer = threading.Thread(target=answer)
        peer.start()
        way = ByHttp(f"http://127.0.0.1:{listener.getsockname()[1]}", "x" * 20)
        with pytest.raises(UnreachableError, match="journal says whether the command was taken"):
            ask(way, {"command": "pause"}, "", 5)
        peer.join()


def test_https_with_files_of_ones_own(serve: Any, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = serve(tls_cert=str(cert), tls_key=str(key))
    assert server.url.startswith("https://")
    assert ask(ByHttp.of_run(tmp_path, cert), {"command": "pause"}, "", 20)["status"] == "accepted"
    with pytest.raises(UnreachableError, match="certificate"):
        ask(ByHttp.of_run(tmp_path), {"command": "pause"}, "", 5)
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(b"POST /commands HTTP/1.1\r\n\r\n")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)), socket.create_connection(("127.0.0.1", server.port)) as raw:
        old.wrap_socket(raw)
    assert ask(ByHttp.of_run(tmp_path, cert), {"command": "pause"}, "", 20)["status"] == "accepted"


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "192.168.1.5", "example.org", "127.0.0.1.example.org"])
def test_an_address_that_others_reach_needs_a_token(address: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    changes = ["control.http=true", f'control.address="{address}"']
    with pytest.raises(ConfigError, match=r"control: address .* can be reached from other machines; set token_file"):
        load_config(recipe, changes)
    assert load_config(recipe, [*changes, "control.token_file=token"]).control.token_file == "token"
    with pytest.raises(ConfigError, match="tls_cert and tls_key belong together"):
        load_config(recipe, ["control.tls_cert=x"])


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(address: str) -> None:
    assert ControlConfig(http=True, address=address).token_file is None


def test_a_token_file_is_private_long_enough_and_stays_where_it_is(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"control.token_file: .*: No such file"):
        read_token(str(path))
    for content, mode, reason in (
        ("a" * 32, 0o644, "chmod 600"),
        ("short", 0o600, "16 or more"),
        ("with a space in the middle", 0o600, "no space"),
        ("two\nlines" + "x" * 20, 0o600, "one line"),
        ("ä" * 32, 0o600, "not ASCII"),
    ):
        path.write_text(content)
        path.chmod(mode)
        with pytest.raises(ConfigError, match=reason):
            read_token(str(path))
    path.write_text("0123456789abcdef0123\n")
    desk = Desk()
    server = serve(desk.hand, token_file=str(path))
    assert "0123456789" not in (tmp_path / "control" / "endpoint.json").read_text()
    assert ask(ByHttp.of_run(tmp_path), {"command": "pause"}, "", 20)["status"] == "accepted"
    assert ask(ByHttp(server.url, read_token(str(path))), {"command": "pause"}, "", 20)["status"] == "accepted"


def test_a_port_that_is_taken_is_one_line(serve: Any) -> None:
    port = serve().port
    with pytest.raises(ConfigError, match=f"control: cannot listen on 127.0.0.1 port {port}"):
        serve(port=port)
