"""Servers that are full, never come to the point, or are no NBD servers: one clear end, in bounded time."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from tests.stack import MIB, QemuNbd, Stack, random_disk, running_stack, same_bytes

pytestmark = pytest.mark.needs("qemu-nbd")

IO_TIMEOUT_S = 1
END_S = 15.0
"""A few times the timeout, and what a busy machine adds; a drip that is not bounded goes on for ever."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    env = {"FLUSHPOINT_IO_TIMEOUT_S": str(IO_TIMEOUT_S)}
    with running_stack(tmp_path_factory.mktemp("stack"), env=env) as running:
        yield running


class Peer:
    """Speaks to every client in its own way, until the client or the test has had enough."""

    def __init__(self, path: Path, speak: Callable[[socket.socket, threading.Event], None]) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self._speak = speak
        self._over = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(END_S)
            self._speak(client, self._over)


def speak_http(client: socket.socket, _: threading.Event) -> None:
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def wait_to_be_spoken_to(client: socket.socket, _: threading.Event) -> None:
    client.recv(1)


def drip(client: socket.socket, over: threading.Event) -> None:
    """Greets as an NBD server, then gives byte for byte one answer after the other to the first question."""
    client.sendall(b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3))
    client.recv(4)
    _, option, _ = struct.unpack(">QII", client.recv(16, socket.MSG_WAITALL))
    for byte in itertools.cycle(struct.pack(">QIII", 0x3E889045565A9, option, 3, 0)):
        client.sendall(bytes([byte]))
        if over.wait(IO_TIMEOUT_S / 2):
            return


@pytest.mark.parametrize("place", ["source", "target"])
@pytest.mark.parametrize(
    ("speak", "code", "said"),
    [
        (speak_http, "refused", "does not greet"),
        (wait_to_be_spoken_to, "unavailable", "sent no NBD greeting"),
        (drip, "unavailable", "did not answer within 1 s"),
    ],
)
def test_a_peer_that_is_no_nbd_server_ends_the_job_with_its_name(
    stack: Stack,
    tmp_path: Path,
    speak: Callable[[socket.socket, threading.Event], None],
    code: str,
    said: str,
    place: str,
) -> None:
    disk = tmp_path / "disk.img"
    with Peer(tmp_path / "peer", speak) as peer:
        pair = (peer.uri, disk) if place == "source" else (random_disk(disk, MIB), peer.uri)
        ended = stack.wait(stack.submit(*pair).id, timeout_s=END_S)
    assert ended.failed
    assert ended.error_code == code
    assert peer.uri in ended.error
    assert said in ended.error
    assert disk.exists() == (place == "target")


def test_a_source_that_lets_one_client_in_is_read_by_one_mover(stack: Stack, tmp_path: Path) -> None:
    """As a qemu-nbd without --shared: others would wait in its backlog, and fail."""
    source = random_disk(tmp_path / "source.img", 256 * MIB)
    with QemuNbd(source, "--read-only", "--shared=1") as server:
        job = stack.mirror(server.uri, tmp_path / "target.img")
    assert job.error == "", stack.logs()
    assert job.max_writers == 1
    assert [e for e in stack.events(job.id) if e["event"] == "BLOCK_JOB_ERROR"] == []
    assert same_bytes(source, tmp_path / "target.img")
