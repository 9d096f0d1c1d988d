"""The same over a real sshd on this machine, with a key of its own."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.ssh import remote_command, run_hosts
from pretrain.processes import StopRequest, free_port

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or os.getuid() != 0, reason="needs sshd, ssh and root"
)


@pytest.fixture
def ssh(tmp_path: Path):
    """The command line that reaches the server."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    port = free_port()
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "PidFile": tmp_path / "pid",
        "PermitRootLogin": "yes",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    (tmp_path / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.PIPE)
    try:
        limit = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None:
                    pytest.skip(f"sshd does not start here: {server.stderr.read().decode()}")
                assert time.monotonic() < limit
                time.sleep(0.05)
        options = ("BatchMode=yes", "StrictHostKeyChecking=no", f"UserKnownHostsFile={tmp_path / 'known'}")
        words = [word for option in options for word in ("-o", option)]
        yield ["ssh", "-T", "-F", "none", *words, "-i", str(tmp_path / "user"), "-p", str(port)]
    finally:
        server.terminate()
        server.wait()


def test_processes_over_ssh(ssh: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts that are one machine, a space and a quote in the folder's name, and an exit code that comes back."""
    folder = tmp_path / "a b'c"
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "__init__.py").write_text("")
    (folder / "launch" / "ssh_host.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "number = int(sys.argv[1])\n"
        "Path(f'seen-{number}').write_text(os.environ['WORLD_SIZE'] + ' '.join(sys.argv[2:]))\n"
        "sys.stdin.readline() if number == 0 else None\n"  # host 0 waits for word that host 1 has failed
        "sys.exit([0, 5][number])\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr("launch.ssh.GRACE_S", 0.5)
    run_dir = folder / "run"
    commands = [
        [*ssh, "127.0.0.1", remote_command(number, 2, {"WORLD_SIZE": "4"}, run_dir, ["train", "c d.yaml"])]
        for number in range(2)
    ]
    assert run_hosts(commands, ["one", "two"], StopRequest()) == 5
    for number in range(2):
        assert (folder / f"seen-{number}").read_text() == f"42 {run_dir} train c d.yaml"
    assert sys.executable in commands[0][-1]
