from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.errors import NotFoundError
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import Session
from workers.qemu.image import ImageInUseError
from workers.qemu.server import QemuNbd

pytestmark = pytest.mark.needs("qemu-nbd")
SIZE = 1024 * 1024
DEADLINE_S = 10


@pytest.fixture
def node(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * SIZE)
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


@pytest.fixture
def server(node: dict[str, object]) -> Iterator[QemuNbd]:
    server = QemuNbd(node, ["--read-only"])
    yield server
    server.close()


def size_of(server: QemuNbd) -> int:
    with Session.open(Endpoint.parse(server.uri), 1) as session:
        return session.size


def ended(pidfd: int) -> bool:
    """Wait for the end of a process, bounded; a pidfd is readable then."""
    return bool(select.select([pidfd], [], [], DEADLINE_S)[0])


def test_answers_whoever_connects_at_once(server: QemuNbd) -> None:
    assert size_of(server) == SIZE


def test_goes_on_when_the_thread_that_started_it_ends(node: dict[str, object]) -> None:
    started: list[QemuNbd] = []
    thread = threading.Thread(target=lambda: started.append(QemuNbd(node, ["--read-only"])))
    thread.start()
    thread.join()
    assert size_of(started[0]) == SIZE
    started[0].close()


def test_works_in_a_process_forked_from_one_that_used_it(server: QemuNbd, node: dict[str, object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            other = QemuNbd(node, ["--read-only"])
            found = size_of(other)
            other.close()
            os._exit(0 if found == SIZE else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_is_killed_with_the_process_that_started_it(node: dict[str, object], tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from workers.qemu.server import QemuNbd\n"
        "from tests.unit.workers.test_qemu_server import size_of\n"
        f"server = QemuNbd({node!r}, ['--read-only'])\n"
        "size_of(server)\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            assert ended(pidfd)
        finally:
            os.close(pidfd)


def test_close_ends_it_and_leaves_nothing(node: dict[str, object]) -> None:
    server = QemuNbd(node, ["--read-only"])
    socket_path = Endpoint.parse(server.uri).socket_path
    assert socket_path is not None
    pidfd = os.pidfd_open(server.pid)
    server.close()
    server.close()
    assert ended(pidfd)
    os.close(pidfd)
    assert not Path(socket_path).parent.exists()


def test_only_its_user_reaches_its_socket(server: QemuNbd) -> None:
    socket_path = Endpoint.parse(server.uri).socket_path
    assert socket_path is not None
    assert Path(socket_path).parent.stat().st_mode & 0o077 == 0


def test_says_why_it_died(node: dict[str, object], tmp_path: Path) -> None:
    server = QemuNbd({"driver": "raw", "file": {"driver": "file", "filename": f"{tmp_path}/none"}}, [])
    death = server.death()
    server.close()
    assert isinstance(death, NotFoundError)
    assert f"{tmp_path}/none" in death.message


def test_an_image_that_is_locked_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], timeout=30, check=True)
    node: dict[str, object] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    first = QemuNbd(node, [])
    size_of(first)
    second = QemuNbd(node, [])
    death = second.death()
    second.close()
    first.close()
    assert isinstance(death, ImageInUseError)


def test_a_stopped_server_is_killed_on_close(node: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.qemu.server.END_TIMEOUT_S", 0.1)
    server = QemuNbd(node, ["--read-only"])
    size_of(server)
    os.kill(server.pid, signal.SIGSTOP)
    pidfd = os.pidfd_open(server.pid)
    server.close()
    assert ended(pidfd)
    os.close(pidfd)
