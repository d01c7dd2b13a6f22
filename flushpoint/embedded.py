"""The embedded stack: one Valkey, one coordinator and one worker for the user who runs the command, with no set-up.

Everything it has is in one directory: `$FLUSHPOINT_STATE_DIR`, else `$XDG_STATE_HOME/flushpoint`, else
`~/.local/state/flushpoint`. This module finds, starts and stops the stack; `flushpoint.supervisor` is the process
that holds it together.

================  ==========================================================================================
api.sock          the API
valkey.sock       Valkey; its append-only file is in appendonlydir/
supervisor.lock   locked (flock) by the supervisor as long as it lives; holds its process id
valkey.lock       locked by Valkey as long as it lives, so that no second one opens the same data
start.lock        locked by a client that is starting the stack
supervisor.log    what the three parts wrote
================  ==========================================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError, UsageError

SOCKET_PATH_MAX_BYTES = 107
"""sun_path of sockaddr_un has 108 bytes, the last of them NUL (unix(7))."""
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 60.0
"""More than the supervisor gives its parts together, see `supervisor.STOP_PLANS`."""
POLL_S = 0.01
HEALTH_TIMEOUT_S = 1.0
LOG_MAX_BYTES = 10 * 1024**2
LOG_TAIL_LINES = 5
ALREADY_RUNNING_EXIT = RefusedError.exit_code


@dataclass(frozen=True, slots=True)
class StateDir:
    """Where the stack keeps its things; nothing is made before `prepare`."""

    path: Path

    @property
    def api_socket(self) -> Path:
        return self.path / "api.sock"

    @property
    def valkey_socket(self) -> Path:
        return self.path / "valkey.sock"

    @property
    def supervisor_lock(self) -> Path:
        return self.path / "supervisor.lock"

    @property
    def valkey_lock(self) -> Path:
        return self.path / "valkey.lock"

    @property
    def start_lock(self) -> Path:
        return self.path / "start.lock"

    @property
    def log(self) -> Path:
        return self.path / "supervisor.log"

    @property
    def address(self) -> str:
        return f"unix://{self.api_socket}"

    def check_length(self) -> None:
        """UsageError if the sockets' paths do not fit into an address."""
        longest = len(os.fsencode(self.valkey_socket))
        if longest > SOCKET_PATH_MAX_BYTES:
            raise UsageError(
                f"{self.valkey_socket} is {longest} bytes long, and the path of a unix socket may have "
                f"{SOCKET_PATH_MAX_BYTES}",
                "set FLUSHPOINT_STATE_DIR to a shorter directory",
            )

    def prepare(self) -> None:
        """Make the directory, for its owner alone. RefusedError if others may change what is in it."""
        self.check_length()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError as error:
            raise RefusedError(
                f"cannot make {self.path}: {error.strerror}",
                "set FLUSHPOINT_STATE_DIR to a directory of yours",
            ) from error
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RefusedError(
                f"others may write to {self.path}, and who reaches its sockets may do everything",
                f"make it yours alone: chmod 700 {self.path}",
            )


def state_dir(environ: Mapping[str, str] = os.environ) -> StateDir:
    """The directory that the environment names."""
    if chosen := environ.get("FLUSHPOINT_STATE_DIR"):
        return StateDir(Path(chosen).absolute())
    # The XDG base directory specification: a relative path is to be ignored.
    state_home = Path(environ.get("XDG_STATE_HOME", ""))
    if not state_home.is_absolute():
        state_home = Path.home() / ".local" / "state"
    return StateDir(state_home / "flushpoint")


def api_address() -> str:
    """The API to talk to: $FLUSHPOINT_API, else the embedded stack's, which is started if it does not run."""
    return os.environ.get("FLUSHPOINT_API") or ensure_running()


def ensure_running(timeout_s: float = START_TIMEOUT_S) -> str:
    """Address of the embedded stack's API, as soon as it answers.

    Any number of clients may call this at once: one of them starts the stack. UnavailableError, with the last
    lines of the log, if the API does not answer in time; UsageError if the stack refuses its settings.
    """
    state = state_dir()
    if api_answers(state):
        return state.address
    state.prepare()
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as held:
        pid = 0
        while time.monotonic() < deadline:
            if api_answers(state):
                return state.address
            if not pid and (lock := _try_lock(state.start_lock)) is not None:
                held.callback(os.close, lock)
                pid = _start_supervisor(state)
            if pid and (code := _failure(pid)) is not None:
                kind = UsageError if code == UsageError.exit_code else UnavailableError
                raise _start_error(state, "ended while it started", kind)
            time.sleep(POLL_S)
    raise _start_error(state, f"does not answer after {timeout_s:g} s")


def stop(timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the stack and wait until all of it is gone; False if it did not run."""
    state = state_dir()
    pid = supervisor_pid(state)
    if pid is None:
        return False
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # Only now that the handle exists can the number no longer become another process's.
        if supervisor_pid(state) != pid:
            return True
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        ended, _, _ = select.select([handle], [], [], timeout_s)
    finally:
        os.close(handle)
    if not ended:
        raise UnavailableError(f"the embedded stack (process {pid}) does not stop", f"see {state.log}")
    return True


def supervisor_pid(state: StateDir) -> int | None:
    """Process id of the running supervisor; None if none runs, whatever an old file says."""
    try:
        descriptor = os.open(state.supervisor_lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode()
        return int(text) if text.strip().isdigit() else None
    finally:
        os.close(descriptor)
    return None


def api_answers(state: StateDir) -> bool:
    """Whether the API says that it is healthy, within a second."""
    connection = http.client.HTTPConnection("flushpoint", timeout=HEALTH_TIMEOUT_S)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(HEALTH_TIMEOUT_S)
        connection.sock.connect(str(state.api_socket))
        connection.request("GET", "/v1/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def locked(path: Path, wait_s: float) -> Iterator[int | None]:
    """Hold `path` locked: its descriptor, or None if another process holds it for longer than `wait_s`."""
    deadline = time.monotonic() + wait_s
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            yield None
            return
        time.sleep(POLL_S)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def log_tail(state: StateDir) -> list[str]:
    """The last lines that the parts wrote."""
    try:
        text = state.log.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-LOG_TAIL_LINES:]


def _try_lock(path: Path) -> int | None:
    """The descriptor that holds the lock as long as it is open; None if another one does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RefusedError(
            f"cannot open {path}: {error.strerror}", "set FLUSHPOINT_STATE_DIR to a directory you can write to"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _start_supervisor(state: StateDir) -> int:
    """Start `flushpoint up` in a session of its own; its process id."""
    log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        with contextlib.suppress(FileNotFoundError):
            if state.log.stat().st_size > LOG_MAX_BYTES:
                state.log.replace(state.log.with_suffix(".log.1"))
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", "flushpoint", "up"],
            {**os.environ, "FLUSHPOINT_STATE_DIR": str(state.path)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(state.log), log_flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except OSError as error:  # posix_spawn does not tell which of its steps failed
        raise UnavailableError(
            f"cannot start the embedded stack: {error.strerror}",
            f"check that you can write {state.log} and that there are processes and memory left, "
            "or set FLUSHPOINT_STATE_DIR to a directory of yours",
        ) from error


def _failure(pid: int) -> int | None:
    """The exit code of the supervisor that we started, unless it lives or made way for one that was there already."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # reaped a moment ago: it had made way
        return None
    code = os.waitstatus_to_exitcode(status) if ended else ALREADY_RUNNING_EXIT
    return None if code == ALREADY_RUNNING_EXIT else code


def _start_error(
    state: StateDir, what: str, kind: type[UsageError | UnavailableError] = UnavailableError
) -> FlushpointError:
    tail = log_tail(state)
    said = f"; its last lines:\n  {chr(10).join(tail).replace(chr(10), chr(10) + '  ')}\n" if tail else ""
    return kind(f"the embedded stack {what}{said}", f"see {state.log}, and try flushpoint doctor")
