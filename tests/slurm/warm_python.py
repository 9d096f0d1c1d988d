"""A stand-in for the interpreter that has imported torch and megatron-core already: a trainer starts in 0.3 s, not 10.

    server = Server(folder)            # one process that imports once and then forks
    Site(python=server.python, environment=server.environment)

SLURM starts `server.python`, a small program that hands its arguments, environment, output and namespaces to the
server; the fork runs `pretrain` in them. Signals to the program reach the fork, its exit code becomes the program's,
and when the program is killed so is the fork. Whatever is not `-m pretrain` runs in the real interpreter.
"""

import array
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

CLIENT = r"""
import array, json, os, signal, socket, struct, sys
words = [word for word in sys.argv[1:] if word != "-P"]
if words[:2] != ["-m", "pretrain"]:
    os.execv(sys.orig_argv[0], [sys.orig_argv[0], *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["WARM_PYTHON"])
asked = json.dumps({"words": words[2:], "cwd": os.getcwd(), "environment": dict(os.environ)}).encode()
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
server.sendmsg([struct.pack("<I", len(asked))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))])
server.sendall(asked)
code = server.recv(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os._exit(code[0] if code else 137)
"""


class Server:
    """The server process, ended with the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "warm.socket"
        self.python = str(folder / "python")
        self.environment = {"WARM_PYTHON": str(self.socket)}
        Path(self.python).write_text(f"#!{sys.executable} -IS\n{CLIENT}")
        Path(self.python).chmod(0o755)
        self._log = (folder / "warm.log").open("wb")
        here = Path(__file__).resolve()
        environment = {**os.environ, "PYTHONPATH": str(here.parents[2])}
        self._process = subprocess.Popen(
            [sys.executable, str(here), str(self.socket)], env=environment, stdout=self._log, stderr=self._log
        )
        while not self.socket.exists():
            assert self._process.poll() is None, (folder / "warm.log").read_text()
            time.sleep(0.05)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()


def serve(path: str) -> None:
    """Fork a trainer for every program that connects."""
    import pretrain.cli
    import pretrain.train  # noqa: F401  (all that is heavy)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.chmod(path + ".new", 0o777)
    children: dict[int, socket.socket] = {}
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: _end(children))
    os.rename(path + ".new", path)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ, "new")
        selector.register(wake, selectors.EVENT_READ, "child")
        while True:
            for key, _ in selector.select():
                if key.data == "new":
                    client, _ = listener.accept()
                    asked, outputs = _receive(client)
                    pid = _fork(client, asked, outputs, [listener, *children.values()])
                    children[pid] = client
                    selector.register(client, selectors.EVENT_READ, pid)
                elif key.data == "child":
                    wake.recv(4096)
                elif number := _message(key.fileobj):
                    os.killpg(key.data, number)
                else:  # the program was killed
                    selector.unregister(key.fileobj)
                    if key.data in children:
                        os.killpg(key.data, signal.SIGKILL)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                code = os.waitstatus_to_exitcode(status)
                client = children.pop(pid)
                try:
                    selector.unregister(client)
                    client.send(bytes([code if code >= 0 else 128 - code]))
                except (KeyError, OSError):
                    pass
                client.close()


def _end(children: dict[int, socket.socket]) -> None:
    for pid in children:
        os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def _message(client: object) -> int:
    assert isinstance(client, socket.socket)
    try:
        return (client.recv(1) or b"\0")[0]
    except OSError:
        return 0


def _receive(client: socket.socket) -> tuple[dict, list[int]]:
    head, extras, _, _ = client.recvmsg(4, socket.CMSG_LEN(2 * 4))
    descriptors = array.array("i")
    descriptors.frombytes(extras[0][2])
    (size,) = struct.unpack("<I", head)
    received = b""
    while len(received) < size:
        received += client.recv(size - len(received))
    return json.loads(received), list(descriptors)


def _fork(client: socket.socket, asked: dict, outputs: list[int], others: list[socket.socket]) -> int:
    pid = os.fork()
    if pid:
        for output in outputs:
            os.close(output)
        return pid
    code = 70
    try:
        os.setsid()
        (program,) = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[:1]
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        libc = ctypes.CDLL(None, use_errno=True)
        # The node's network, host name, processes and /etc/hosts; where all are one, nothing to do.
        for name in ("net", "uts", "pid", "mnt"):
            if os.readlink(f"/proc/{program}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"):
                with open(f"/proc/{program}/ns/{name}") as namespace:
                    assert libc.setns(namespace.fileno(), 0) == 0, name
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
        for other in (client, *others):
            other.close()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if inside := os.fork():  # only children enter another pid namespace
            code = os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1])
            os._exit(code if code >= 0 else 128 - code)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = ["headrace", *asked["words"]]
        code = _train()
    finally:
        os._exit(code)


def _train() -> int:
    import torch

    from pretrain.cli import main

    torch.set_num_threads(1)
    try:
        main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
