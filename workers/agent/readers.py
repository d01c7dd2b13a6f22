"""Starts and ends readers (reader.py)."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.epoch import DiskCopy
from coordinator.model.errors import UnavailableError
from workers.agent.fleece import Fleece
from workers.agent.reader import ReadDisk, Reading, Ready
from workers.agent.stage import BITMAP
from workers.nbd.endpoint import Endpoint, Tls

START_S = 20.0
"""On a host that is busy with other things."""


@dataclass(frozen=True, slots=True)
class Reader:
    """One that can be connected to."""

    process: asyncio.subprocess.Process
    reading: Reading

    def path_of(self, name: str) -> str:
        """The URI by which movers on this host read a disk ..."""
        return str(Endpoint(None, 0, str(self.reading.path), name))

    def uri_of(self, name: str) -> str:
        """... and those elsewhere; "" if there are none."""
        host, tls = self.reading.host, self.reading.tls
        return str(Endpoint(host, self.reading.port, None, name, Tls() if tls else None)) if host else ""

    async def ended(self) -> str:
        """Waits until it has, and says how."""
        code = await self.process.wait()
        return f"the reader of the view was killed (signal {-code})" if code < 0 else "the reader of the view has ended"

    async def kill(self) -> None:
        """Whatever it is doing. Its socket stays for the next to replace."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


@dataclass(frozen=True, slots=True)
class Readers:
    """`host` is where movers elsewhere connect to, if there are any, and `tls` a directory of certificates, as a relay
    has them (relay.py)."""

    guard: Path
    scratch: Path
    host: str = ""
    tls: str = ""

    async def start(self, fleece: Fleece, disks: Sequence[ReadDisk]) -> Reader:
        """UnavailableError."""
        path = self.scratch / f"{fleece.directory.stem}.reader"
        return await _started(
            Reading(
                path=path,
                host=self.host,
                tls=self.tls,
                disks=tuple(disks),
                guard=self.guard,
                guest=str(fleece.monitor),
                socket=fleece.socket,
                bitmap=BITMAP,
            )
        )

    async def refuse(self, before: Reading, why: str) -> Reader:
        """In the place of one that is gone, with nothing but an answer. UnavailableError."""
        disks = before.disks
        return await _started(
            Reading(path=before.path, host=before.host, port=before.port, tls=before.tls, disks=disks, why=why)
        )

    def told_of(self, copies: Sequence[DiskCopy]) -> Reading:
        """As far as can be known by what the ledger was told of the copies that somebody read from it."""
        local = [Endpoint.parse(copy.path) for copy in copies]
        disks = [ReadDisk(name=at.export, size=copy.size) for at, copy in zip(local, copies, strict=True)]
        reading = Reading(path=Path(local[0].socket_path or ""), tls=self.tls, disks=tuple(disks))
        if not copies[0].uri:
            return reading
        far = Endpoint.parse(copies[0].uri)
        return reading.model_copy(update={"host": far.host, "port": far.port})


async def _started(reading: Reading) -> Reader:
    """It ends with this process, which must be its parent's only thread that starts processes (prctl(2), PDEATHSIG)."""
    # -P, so that the directory it is started in shadows no module.
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-P", "-m", "workers.agent.reader"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(reading.model_dump_json().encode() + b"\n")
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        ready = Ready.model_validate_json(line) if line else Ready(error="it ended")
        if ready.error:
            raise UnavailableError(f"no reader of a view can be started: {ready.error}", "look at the agent's log")
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError | ConnectionError):
            raise UnavailableError("no reader of a view could be started in time", "look at the agent's log") from error
        raise
    process.stdin.close()
    return Reader(process, reading.model_copy(update={"port": ready.port}))
