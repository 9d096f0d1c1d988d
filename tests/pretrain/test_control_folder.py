"""The folder that commands come through, met with what nobody should send: links, pipes, floods, odd names."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from control_requests import ID, Desk, request

from data_scheduler.control import RefusedError
from headrace.errors import ConfigError, UnreachableError
from pretrain.control import client as client_module
from pretrain.control.client import ByFile, ByHttp, ask
from pretrain.control.inbox import Folder, Inbox


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


def test_a_client_finds_out_what_is_wrong_before_it_sends(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="weights"):
        ask(ByFile(tmp_path), {"command": "set-mix", "weights": {"a": -1.0}}, "", 1)
    assert not list(folder.inbox.iterdir())
    with pytest.raises(ConfigError, match=r"no journal\.jsonl there"):
        ByFile(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="give http://host:port"):
        ByHttp("file:///etc/passwd", "x" * 20)
    assert client_module._user()
