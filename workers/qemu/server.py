"""A qemu-nbd of our own, serving one image to this process over a private unix socket.

The socket is made and listened on here, and handed to qemu-nbd as systemd would (LISTEN_FDS), so there is
nothing to wait for: a connection made at once is answered when the server is up, and breaks if it dies.

::

    this process ── bind, listen ──> DIR/nbd (0700)          DIR is removed by close()
         │                              │
         └── spawn ── sh ── setpriv --pdeathsig ── qemu-nbd   (one process, by exec)
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from coordinator.model.errors import FlushpointError, UnavailableError
from workers.qemu.image import refusal

END_TIMEOUT_S = 10.0
"""qemu-nbd flushes and closes the image when told to end; past this it is killed."""
DEATH_TIMEOUT_S = 2.0
"""How long to wait for the exit of a server whose connection broke, for its last words."""
BACKLOG = 64

# $$ is the pid that exec keeps, and LISTEN_PID has to be that of qemu-nbd. The socket comes as standard
# input because dash cannot duplicate a descriptor above 9.
_ACTIVATE = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


class QemuNbd:
    """A running qemu-nbd. `uri` is where it listens; close() ends it and waits for the end."""

    def __init__(self, node: dict[str, Any], options: Sequence[str]) -> None:
        """Serve `node` (a QAPI BlockdevOptions) with `options` of qemu-nbd. UnavailableError if not installed."""
        for program, package in (("qemu-nbd", "qemu-utils"), ("setpriv", "util-linux")):
            if shutil.which(program) is None:
                raise UnavailableError(f"{program} is not on the worker's PATH", f"install {package}")
        self._closing = threading.Lock()
        self._command = ["qemu-nbd", "--persistent", "--shared=0", *options, "json:" + json.dumps(node)]
        self._directory = Path(tempfile.mkdtemp(prefix="flushpoint-nbd-"))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        path = self._directory / "nbd"
        self.uri = f"nbd+unix:///?socket={quote(str(path))}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(path))
                listener.listen(BACKLOG)
                self._process = _spawn(self._command, listener.fileno(), self._stderr.fileno())
        except BaseException:
            self._remove_files()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def death(self) -> FlushpointError | None:
        """Why it ended, if it did; waits a moment for a process that is just ending."""
        try:
            self._process.wait(DEATH_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        self._stderr.seek(0)
        return refusal(self._stderr.read(64 * 1024).decode(errors="replace"), self._command)

    def close(self) -> None:
        """End it: its image is flushed, closed and unlocked when this returns."""
        with self._closing:
            if self._stderr.closed:
                return
            self._process.terminate()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._remove_files()

    def _remove_files(self) -> None:
        self._stderr.close()
        shutil.rmtree(self._directory, ignore_errors=True)


_spawner: ThreadPoolExecutor | None = None
_spawner_lock = threading.Lock()


def _spawn(command: list[str], listener: int, stderr: int) -> subprocess.Popen[bytes]:
    """Start `command` so that it is killed when this process ends, however it ends.

    Linux sends the parent death signal when the *thread* that forked ends, so one thread that lives as long
    as the process forks all of them.
    """
    global _spawner
    with _spawner_lock:
        if _spawner is None:
            _spawner = ThreadPoolExecutor(1, thread_name_prefix="qemu-nbd-parent")
        started = _spawner.submit(_start, command, listener, stderr)
    return started.result()


def _forget_spawner() -> None:
    """Threads do not survive a fork: the processes of Celery's pool each make their own."""
    global _spawner, _spawner_lock
    _spawner = None
    _spawner_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_spawner)


def _start(command: list[str], listener: int, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", "-c", _ACTIVATE, "sh", "setpriv", "--pdeathsig", "KILL", "--", *command],
        stdin=listener,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,  # a Ctrl-C at the terminal is ours to answer, in order
    )
