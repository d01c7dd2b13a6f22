"""Whether a guest's QEMU outlives being read: tried on another one of the same program, before the guest is.

QEMU 7.2 aborts when an NBD client leaves an export whose node lives in an IOThread (blockdev-nbd.c:62,
nbd_blockdev_client_closed: Assertion `qemu_in_main_thread() && nbd_server' failed): whoever reads a guest kills it.
No version number tells who has mended that in which distribution, so a QEMU without a guest is read, left politely and
impolitely, and has to answer afterwards. That takes half a second, once for every program.

The program runs as the user of the guest's QEMU, and not as the agent's: what a process says to be its program is no
more to be trusted than the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.model.errors import FlushpointError, UnavailableError
from workers.agent.monitor import Monitor
from workers.nbd.connection import connect
from workers.nbd.endpoint import Endpoint

PROBE_S = 10.0
"""For one try, on a host that has other things to do, too."""
NBD_S = 5.0
ANSWER_S = 5.0
"""A QEMU that is silent for longer hangs."""
READS = 3
"""How often it is left in each way."""
_READ_BYTES = 65536
_AGAIN_S = 0.02
_ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""Nothing of the agent's: the program is one that a guest may have broken out of."""
_SPOKEN = frozenset(
    {"blockdev-add", "block-export-add", "block-export-del", "nbd-server-start", "nbd-server-stop", "query-status"}
)


@dataclass(frozen=True, slots=True)
class Program:
    """What a process runs, by what tells it from another one at the same path."""

    device: int
    inode: int
    changed_ns: int


@dataclass
class Probe:
    """Remembers what it has found out for as long as the agent lives. Of one event loop."""

    _found: dict[tuple[Program, bool], str] = field(default_factory=dict)
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def why_not(self, monitor: Monitor, *, iothread: bool, timeout_s: float = PROBE_S) -> str:
        """Why the QEMU behind a monitor had better not be read; "" if nothing speaks against it. `iothread`: the disk
        is served by one. Bounded by `timeout_s`; what could not be tried in that time is tried again the next time."""
        try:
            with _program(monitor.pid_of_qemu()) as (descriptor, program):
                async with asyncio.timeout(timeout_s), self._one:  # several machines wait for the same one
                    key = (program, iothread)
                    if key not in self._found:
                        self._found[key] = await _tried(descriptor, monitor.user_of_qemu(), iothread=iothread)
                    return self._found[key]
        except TimeoutError:
            return f"whether the guest's QEMU can be read was not found out within {timeout_s:g} s"
        except OSError as error:
            return f"the program of the guest's QEMU cannot be tried: {error.strerror or error}"
        except FlushpointError as error:
            return f"whether the guest's QEMU can be read was not found out: {error.message}"


@contextmanager
def _program(pid: int) -> Iterator[tuple[int, Program]]:
    """Also of one that was replaced or removed since it was started. OSError."""
    descriptor = os.open(f"/proc/{pid}/exe", os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        yield descriptor, Program(status.st_dev, status.st_ino, status.st_mtime_ns)
    finally:
        os.close(descriptor)


async def _tried(program: int, user: tuple[int, int], *, iothread: bool) -> str:
    """The same answer as of `why_not`. UnavailableError if it did not come to a try."""
    with tempfile.TemporaryDirectory(prefix="flushpoint-probe-") as name:
        directory = Path(name)
        if user[0] != os.geteuid():
            os.chown(directory, *user)
        async with _running(program, user, directory) as (process, monitor):
            try:
                await _export(monitor, directory, iothread=iothread)
            except FlushpointError as error:
                return f"the guest's QEMU cannot be read: {error.message}"
            left = await asyncio.to_thread(_read, Endpoint(None, 0, str(directory / "nbd"), "probe"))
            try:
                await monitor.execute("query-status", timeout_s=ANSWER_S)
                await monitor.execute("block-export-del", {"id": "probe", "mode": "hard"}, ANSWER_S)
                await monitor.execute("nbd-server-stop", timeout_s=ANSWER_S)
            except FlushpointError:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 1.0)
                return f"its QEMU {_end_of(process)} when {'a disk with an IOThread' if iothread else 'it'} was read"
            return left


@asynccontextmanager
async def _running(
    program: int, user: tuple[int, int], directory: Path
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Monitor]]:
    """A QEMU that has no guest, from an open file. UnavailableError if it does not start."""
    path = directory / "qmp"
    command = ["setpriv", "--pdeathsig", "KILL", "--no-new-privs"]
    if user[0] != os.geteuid():
        command += ["--reuid", str(user[0]), "--regid", str(user[1]), "--clear-groups"]
    command += ["--", f"/proc/self/fd/{program}", "-machine", "none,accel=tcg:kvm", "-S", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-object", "iothread,id=thread"]
    command += ["-qmp", f"unix:{path},server=on,wait=off"]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=(program,), cwd="/", env=_ENVIRON
    )
    try:
        monitor = await _greeted(process, path)
        try:
            yield process, monitor
        finally:
            await monitor.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _greeted(process: asyncio.subprocess.Process, path: Path) -> Monitor:
    while True:
        try:
            return await Monitor.connect(path, allowed=_SPOKEN)
        except FlushpointError as error:
            if process.returncode is not None:
                raise UnavailableError(f"another one of its program {_end_of(process)}") from error
            await asyncio.sleep(_AGAIN_S)


async def _export(monitor: Monitor, directory: Path, *, iothread: bool) -> None:
    """A view, as of a guest's disk: of one that holds nothing."""
    for name in ("disk", "scratch"):
        await monitor.execute("blockdev-add", {"driver": "null-co", "node-name": name, "read-zeroes": True})
    view = {"driver": "copy-before-write", "node-name": "filter", "file": "disk", "target": "scratch"}
    await monitor.execute("blockdev-add", view)
    await monitor.execute("blockdev-add", {"driver": "snapshot-access", "node-name": "view", "file": "filter"})
    address = {"type": "unix", "data": {"path": str(directory / "nbd")}}
    await monitor.execute("nbd-server-start", {"addr": address, "max-connections": 1})
    thread = {"iothread": "thread"} if iothread else {}
    await monitor.execute(
        "block-export-add", {"type": "nbd", "id": "probe", "node-name": "view", **thread, "name": "probe"}
    )


def _read(endpoint: Endpoint) -> str:
    """Read, and leave with and without a word; what went wrong, "" if nothing did."""
    try:
        for _ in range(READS):
            for is_polite in (True, False):
                connection = connect(endpoint, contexts=["base:allocation"], timeout_s=NBD_S)
                try:
                    connection.read_into(0, memoryview(bytearray(_READ_BYTES)))
                    connection.block_status("base:allocation", 0, _READ_BYTES)
                    if not is_polite:
                        connection.abort()
                finally:
                    connection.close()
    except FlushpointError as error:
        return f"the guest's QEMU cannot be read: {error.message}"
    return ""


def _end_of(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    if code is None:
        return "hung"
    return f"died ({signal.Signals(-code).name})" if code < 0 else f"ended ({code})"
