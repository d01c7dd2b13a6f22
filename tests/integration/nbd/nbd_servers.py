"""Real NBD servers for a test: on a unix socket or TCP loopback, ready when entered, ended by their process id."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.nbd.endpoint import Endpoint, Tls

MIB = 1 << 20


def run(*command: str) -> str:
    """The output of a program that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@contextmanager
def served(
    directory: Path, *command: str, export: str = "", tls: Tls | None = None, tcp: bool = False
) -> Iterator[Endpoint]:
    """qemu-nbd or nbdkit by socket activation: the socket listens before the server runs, so nobody has to wait."""
    if tcp:
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, _activated(command, listener):
            yield Endpoint("127.0.0.1", listener.getsockname()[1], None, export, tls)
        return
    path = directory / f"{len(list(directory.glob('*.sock')))}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        with _activated(command, listener):
            yield Endpoint(None, 0, str(path), export, tls)


@contextmanager
def storage_daemon(directory: Path, *options: str, export: str) -> Iterator[Endpoint]:
    """qemu-storage-daemon with an NBD server; its monitor answers once everything is set up."""
    path = directory / "daemon.sock"
    command = [
        "qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "m",
        "--nbd-server", f"addr.type=unix,addr.path={path}", *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process, _ended(process):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"execute": "qmp_capabilities"}\n')
        process.stdin.flush()
        assert process.stdout.readline(), "it greets"
        assert process.stdout.readline(), "and answers only when all of its options have been carried out"
        yield Endpoint(None, 0, str(path), export)


@contextmanager
def _activated(command: tuple[str, ...], listener: socket.socket) -> Iterator[None]:
    """sd_listen_fds(3): the descriptor is number 3, and LISTEN_PID is the server's own."""
    shell = f'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&{listener.fileno()}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command], stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()]
    )
    with _ended(process):
        yield


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()  # nbdkit, asked politely, waits for its clients
        process.wait()
