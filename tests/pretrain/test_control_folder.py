"""The two ways in, met with what nobody should send: files, links and requests that are not what they claim."""

import contextlib
import http.client
import json
import os
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
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler.control import RefusedError
from headrace.errors import ConfigError, UnreachableError
from pretrain.config import ControlConfig, load_config
from pretrain.control import client as client_module
from pretrain.control import server as server_module
from pretrain.control.client import ByFile, ByHttp, ask
from pretrain.control.inbox import Folder, Inbox
from pretrain.control.request import MAX_BYTES, Request, read_request
from pretrain.control.server import Server, read_token

ID = "00000000-test"
PAUSE = {"id": ID, "ask": {"command": "pause"}}


def request(**changes: Any) -> bytes:
    return json.dumps(PAUSE | changes).encode()


# -- what a request may say ------------------------------------------------------------------------------------------

MIX = {"command": "set-mix", "weights": {"a": 1.0}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a JSON object"),
        (b"[]", "request"),
        (b"\xff\xfe{}", "not a JSON object"),
        (b"[" * 50_000, "not a JSON object"),
        (b'{"a":1}' + b" " * MAX_BYTES, "bytes at most"),
        (request(more=1), "more: Extra inputs"),
        (request(id="short"), "id"),
        (request(id="../../etc/passwd"), "id"),
        (request(id=ID + "\n"), "id"),
        (request(user="root\n"), "user"),
        (request(user="a:b"), "user"),
        (request(why="x" * 2001), "why"),
        (request(why="\x1b[2J"), "control characters"),
        (request(ask={"command": "rm"}), "ask"),
        (request(ask={"command": "pause", "now": True}), "Extra inputs"),
        (request(ask=MIX | {"weights": {}}), "weights"),
        (request(ask=MIX | {"weights": {"a": "1"}}), "weights"),
        (request(ask=MIX | {"weights": {"a": -1}}), "weights"),
        (request(ask=MIX | {"weights": {"a/b": 1.0}}), "weights"),
        (request(ask=MIX | {"over": 1}), "over"),
        (request(ask=MIX | {"at": "-5"}), "at"),
        (request(ask=MIX | {"at": "٣"}), "at"),
        (request(ask=MIX | {"at": 5}), "at"),
        (request(ask=MIX).replace(b"1.0", b"NaN"), "not a JSON object"),
        (request(ask=MIX).replace(b"1.0", b"1e999"), ""),
        (request(ask={"command": "set-lr-scale", "scale": True}), "scale"),
        (request(ask={"command": "undo", "event": 10**30}), "event"),
        (request(ask={"command": "undo", "event": 1.0}), "event"),
        (request(ask={"command": "add-source", "source": {"name": "../x", "paths": ["x"]}}), "name"),
        (request(ask={"command": "add-source", "source": {"name": "x", "paths": [], "evil": 1}}), "source"),
    ],
)
def test_a_request_that_is_not_one_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason) as caught:
        read_request(content)
    assert len(str(caught.value)) < 500


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=300) | st.integers(0, 120).flatmap(lambda at: st.binary(max_size=3).map(lambda b: mixed(at, b)))
)
def test_any_bytes_are_a_request_or_refused(content: bytes) -> None:
    with contextlib.suppress(RefusedError):
        assert isinstance(read_request(content), Request)


def mixed(at: int, junk: bytes) -> bytes:
    whole = request(ask=MIX)
    return whole[:at] + junk + whole[at + len(junk) :]


# -- files -----------------------------------------------------------------------------------------------------------


class Desk:
    """Answers everything, and remembers it."""

    def __init__(self) -> None:
        self.heard: list[tuple[Request, str]] = []

    def hand(self, asked: Request, who: str, *rest: Any) -> None:
        self.heard.append((asked, who))
        rest[-1]({"id": asked.id, "status": "accepted", "event": len(self.heard), "step": 1, "kind": "paused"})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "journal.jsonl").touch()
    made = Folder(tmp_path)
    made.create()
    return made


def looked(folder: Folder) -> tuple[Desk, dict[str, Any]]:
    """What the desk heard of one look, and the answers by name."""
    desk = Desk()
    inbox = Inbox(folder, desk.hand)
    inbox.look()
    inbox.look()
    return desk, {path.name: json.loads(path.read_bytes()) for path in folder.answers.iterdir()}


def put(folder: Folder, name: str, content: bytes) -> None:
    (folder.inbox / name).write_bytes(content)


def test_a_file_is_taken_answered_and_gone(folder: Folder) -> None:
    put(folder, f"{ID}.json", request(user="mallory", host="far"))
    desk, answers = looked(folder)
    owner = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert [who for _, who in desk.heard] == [f"{owner}@far"]  # the file's owner, whoever it says it is
    assert answers[f"{ID}.json"]["status"] == "accepted"
    assert not list(folder.inbox.iterdir()) + list(folder.taken.iterdir())


def test_what_is_being_written_waits_and_odd_names_are_put_aside(folder: Folder) -> None:
    put(folder, f".{ID}.json.1", request())
    for name in (
        "x.json",
        "UPPER-CASE-NAME.json",
        "no-suffix-here",
        "a" * 200 + ".json",
        "-rf-rf-rf.json",
        "päuse-päuse.json",
    ):
        put(folder, name, request())
    (folder.inbox / "a-folder-here.txt").mkdir()
    desk, answers = looked(folder)
    assert desk.heard == []
    assert answers == {}
    assert [path.name for path in folder.inbox.iterdir()] == [f".{ID}.json.1"]
    assert len(list(folder.refused.iterdir())) == 7


def test_links_pipes_folders_and_large_files_are_not_read(folder: Folder, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    names = [f"0000000{number}-test.json" for number in range(8)]
    secret.write_bytes(request(id=names[0].removesuffix(".json")))
    (folder.inbox / names[0]).symlink_to(secret)
    (folder.inbox / names[1]).symlink_to("/dev/zero")
    os.mkfifo(folder.inbox / names[2])
    (folder.inbox / names[3]).mkdir()
    (folder.inbox / names[4]).symlink_to(tmp_path / "nowhere")
    with open(folder.inbox / names[5], "wb") as sparse:
        sparse.truncate(1 << 40)
    put(folder, names[6], b'{"half": "writ')
    put(folder, names[7], request())  # its id is another's
    desk, answers = looked(folder)
    assert desk.heard == []
    assert {name: answer["status"] for name, answer in answers.items()} == dict.fromkeys(names, "refused")
    assert "the id in it" in answers[names[7]]["reason"]
    assert secret.exists()
    assert not list(folder.inbox.iterdir()) + list(folder.taken.iterdir())


def test_a_link_in_the_place_of_an_answer_is_replaced(folder: Folder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder.answers / f"{ID}.json").symlink_to(victim)
    put(folder, f"{ID}.json", request())
    _, answers = looked(folder)
    assert answers[f"{ID}.json"]["status"] == "accepted"
    assert victim.read_text() == "mine"


def test_what_a_killed_run_had_taken_is_read_again(folder: Folder) -> None:
    (folder.taken / f"{ID}.json").write_bytes(request())
    (folder.taken / "junk").write_bytes(request())
    desk, answers = looked(folder)
    assert [asked.id for asked, _ in desk.heard] == [ID]
    assert set(answers) == {f"{ID}.json"}


def test_a_flood_is_taken_in_turns(folder: Folder) -> None:
    for number in range(150):
        name = f"{number:08d}-test"
        put(folder, f"{name}.json", request(id=name))
    desk = Desk()
    inbox = Inbox(folder, desk.hand)
    counts = []
    for _ in range(4):
        inbox.look()
        counts.append(len(desk.heard))
    assert counts == [64, 128, 150, 150]


def test_a_command_that_nobody_takes_is_withdrawn(folder: Folder) -> None:
    with pytest.raises(UnreachableError, match="withdrawn and nothing is changed"):
        ask(ByFile(folder.path.parent), {"command": "pause"}, "", 0.1)
    assert not list(folder.inbox.iterdir())


def test_a_command_that_was_taken_but_not_answered_says_so(folder: Folder) -> None:
    def take() -> None:
        while not (names := [path for path in folder.inbox.iterdir() if not path.name.startswith(".")]):
            time.sleep(0.001)
        os.rename(names[0], folder.taken / names[0].name)

    taker = threading.Thread(target=take)
    taker.start()
    with pytest.raises(UnreachableError, match="has taken the command but not answered"):
        ask(ByFile(folder.path.parent), {"command": "pause"}, "", 0.5)
    taker.join()


def test_many_clients_at_once_each_get_their_own_answer(folder: Folder) -> None:
    desk = Desk()
    inbox = Inbox(folder, desk.hand)
    inbox.start()
    found: list[dict[str, Any]] = []
    way = ByFile(folder.path.parent)
    clients = [threading.Thread(target=lambda: found.append(ask(way, {"command": "pause"}, "", 30))) for _ in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    inbox.stop()
    assert sorted(answer["event"] for answer in found) == list(range(1, 21))
    assert not list(folder.answers.iterdir())


# -- HTTP ------------------------------------------------------------------------------------------------------------


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


# -- configuration ---------------------------------------------------------------------------------------------------


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


def test_a_client_finds_out_what_is_wrong_before_it_sends(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="weights"):
        ask(ByFile(tmp_path), {"command": "set-mix", "weights": {"a": -1.0}}, "", 1)
    assert not list(folder.inbox.iterdir())
    with pytest.raises(ConfigError, match=r"no journal\.jsonl there"):
        ByFile(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="give http://host:port"):
        ByHttp("file:///etc/passwd", "x" * 20)
    assert client_module._user()
