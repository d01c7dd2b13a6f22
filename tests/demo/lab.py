"""A directory, servers and an embedded stack of its own, for the demo and the bench; nothing of it outlives them."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from flushpoint import embedded

MIB = 1024**2
GIB = 1024**3
COMMAND_TIMEOUT_S = 300.0
SERVER_START_S = 10.0
STOP_S = 15.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class LabError(Exception):
    """A program failed, or something did not happen in time; the message says which."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a program said, and what it cost: seconds of wall clock and of CPU (with its children)."""

    stdout: str
    seconds: float
    cpu_seconds: float


def run(command: Sequence[str | Path], *, stdin: str | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Finished:
    """Run a program to its end; LabError with its last words if it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.monotonic()
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, stdout=out, stderr=err, text=True
        )
        try:
            if stdin is not None and child.stdin is not None:
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(stdin)
            usage = _wait(child, begin + timeout_s)
        except BaseException:
            child.kill()
            child.wait()
            raise
        seconds = time.monotonic() - begin
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if child.returncode != 0:
        words_of_it = (stderr or stdout).strip()[-2000:]
        raise LabError(f"{' '.join(words)} left with {child.returncode}: {words_of_it}")
    return Finished(stdout, seconds, usage)


def _wait(child: subprocess.Popen[str], deadline: float) -> float:
    """Reap the child by wait4, which tells its CPU seconds exactly; LabError past the deadline."""
    pidfd = os.pidfd_open(child.pid)
    try:
        if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise LabError(f"{child.args!r} did not end in time")
    finally:
        os.close(pidfd)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    cpu_seconds: float
    """Its own and its reaped children's."""
    command: str


def processes() -> dict[int, Process]:
    """All processes of the machine that can be read, by pid."""
    found: dict[int, Process] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # proc(5): the name in parentheses may hold anything; the fields after it are numbered from 3.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z":
                continue
            ticks = sum(int(fields[n]) for n in (11, 12, 13, 14))  # utime, stime, cutime, cstime
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            found[int(entry.name)] = Process(int(entry.name), int(fields[1]), ticks / _TICKS_PER_S, command)
    return found


def peak_memory(pid: int) -> int:
    """Largest resident size the process ever had, in bytes (VmHWM); 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Stack:
    """The embedded stack: its supervisor, and everything that descends from it."""

    def members(self) -> list[Process]:
        """Nothing while it does not run."""
        supervisor = embedded.supervisor_pid(embedded.state_dir())
        table = processes()
        ours = {supervisor} & table.keys() if supervisor is not None else set()
        new = ours
        while new:
            new = {p.pid for p in table.values() if p.parent in new} - ours
            ours = ours | new
        return [table[pid] for pid in sorted(ours)]

    def movers(self) -> list[Process]:
        """The processes that copy: those that the worker forked from itself."""
        members = self.members()
        workers = {p.pid for p in members if p.command.endswith("-m workers")}
        return [p for p in members if p.parent in workers and p.command.endswith("-m workers")]

    def cpu_seconds(self) -> float:
        return sum(p.cpu_seconds for p in self.members())

    def mover_cpu_seconds(self) -> float:
        return sum(p.cpu_seconds for p in self.movers())

    def stop(self) -> None:
        """Stop all of it; LabError, after killing it, if something stays."""
        before = {(p.pid, p.command) for p in self.members()}
        embedded.stop()

        def left() -> set[tuple[int, str]]:
            return before & {(p.pid, p.command) for p in processes().values()}

        if wait_until(lambda: not left(), STOP_S):
            return
        survivors = left()
        for pid, _ in survivors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise LabError(f"went on running after the stack was stopped: {', '.join(command for _, command in survivors)}")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition()` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Lab:
    """`with Lab("demo", need=…) as lab:` a fresh directory at `lab.path`; servers, stack and files end with it."""

    def __init__(self, name: str, need: int) -> None:
        """`need` bytes are wanted: in memory if there is that much, else where temporary files go."""
        self._name = name
        self._need = need
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        where = next((d for d in (Path("/dev/shm"), Path(tempfile.gettempdir())) if d.is_dir() and self._fits(d)), None)
        if where is None:
            raise LabError(f"neither /dev/shm nor {tempfile.gettempdir()} has {self._need // MIB} MiB free; set TMPDIR")
        self.path = Path(tempfile.mkdtemp(prefix=f"flushpoint-{self._name}-", dir=where))
        self.stack = Stack()
        os.environ["FLUSHPOINT_STATE_DIR"] = str(self.path / "state")
        os.environ.pop("FLUSHPOINT_API", None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for line in embedded.log_tail(embedded.state_dir()):
                print(f"stack: {line}", file=sys.stderr)
        try:
            self.stack.stop()
        finally:
            for server in list(self._servers):
                self.stop_server(server)
            shutil.rmtree(self.path)

    def _fits(self, directory: Path) -> bool:
        # A quarter more: the last files are written while the first are still there.
        return shutil.disk_usage(directory).free > self._need * 5 // 4

    def serve(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Start an NBD server that makes the unix socket `self.socket(name)`, and wait for it."""
        socket = self.socket(name)
        socket.unlink(missing_ok=True)
        log = self.path / f"{name}.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._servers.append(server)
        if (
            not wait_until(lambda: socket.exists() or server.poll() is not None, SERVER_START_S)
            or server.poll() is not None
        ):
            raise LabError(f"{command[0]} did not start: {log.read_text()[-500:]}")
        return server

    def stop_server(self, server: subprocess.Popen[bytes]) -> None:
        self._servers.remove(server)
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

    @contextlib.contextmanager
    def serving(self, name: str, command: Sequence[str | Path]) -> Iterator[str]:
        """The URI of what `command` serves at `self.socket(name)`, for as long as the block lasts."""
        server = self.serve(name, command)
        try:
            yield self.uri(name)
        finally:
            self.stop_server(server)

    def socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def uri(self, name: str) -> str:
        return f"nbd+unix:///?socket={self.socket(name)}"

    def qemu_nbd(self, name: str, image: Path, image_format: str, *options: str) -> list[str | Path]:
        """A qemu-nbd for any number of clients; with "-r" among the options for readers only."""
        return ["qemu-nbd", "--persistent", "--shared=0", "-f", image_format, "-k", self.socket(name), *options, image]
