"""Staged images, offered to movers on other hosts: by a qemu-storage-daemon that nothing of a guest depends on.

::

    agent ── QMP ──> qemu-storage-daemon ── NBD over TLS ──> movers
                          │ read-only
                     SCRATCH/GROUP@EPOCH/VM/DISK.qcow2        export GROUP@EPOCH/VM/DISK

It ends with its agent, and the next one offers again what epochs still need, under the same names; one that dies is
started anew. Movers whose connection breaks meanwhile try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from coordinator.model.errors import FlushpointError, UnavailableError
from workers.agent.monitor import Monitor
from workers.nbd.endpoint import Endpoint, Tls

ALLOWED = frozenset({"blockdev-add", "blockdev-del", "block-export-add", "block-export-del", "query-block-exports"})
"""All that is said to it."""
START_S = 10.0
END_S = 10.0
AGAIN_S = 1.0
"""Before one that died is started anew."""

log = structlog.get_logger()


class Relay:
    """`host` and `port` are where it listens, and what movers connect to; `tls` is a directory with ca-cert.pem,
    server-cert.pem and server-key.pem, by which clients are asked for certificates of the same authority; "" is plain
    TCP."""

    def __init__(self, directory: Path, host: str, port: int, tls: str) -> None:
        self._directory = directory
        self._host = host
        self._port = port
        self._tls = tls
        self._offered: dict[str, Path] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._monitor: Monitor | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._order = asyncio.Lock()

    async def start(self) -> None:
        """UnavailableError if it cannot listen, or is not installed."""
        await self._start()
        self._keeping = asyncio.create_task(self._keep())

    async def offer(self, name: str, image: Path) -> str:
        """The URI by which movers read a qcow2 image that nobody writes any more."""
        async with self._order:
            self._offered[name] = image
            if self._monitor is not None:
                await self._add(self._monitor, name, image)
        endpoint = Endpoint(self._host, self._port, None, name, Tls() if self._tls else None)
        return str(endpoint)

    async def withdraw(self, prefix: str) -> None:
        """What was offered under names that begin so; whoever still reads it is sent away."""
        async with self._order:
            for name in [name for name in self._offered if name.startswith(prefix)]:
                del self._offered[name]
                if self._monitor is not None:
                    with contextlib.suppress(FlushpointError, TimeoutError):  # the next one does not offer it
                        await self._remove(self._monitor, name)

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._end()

    async def _start(self) -> None:
        path = self._directory / "relay.qmp"
        path.unlink(missing_ok=True)
        command = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-storage-daemon", *self._options(path)]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
        try:
            self._monitor = await self._connected(path)
        except BaseException:
            await self._end()
            raise

    def _options(self, monitor: Path) -> Sequence[str]:
        listens = f"addr.type=inet,addr.host={self._host},addr.port={self._port}"
        options = ["--chardev", f"socket,id=m,path={monitor},server=on,wait=off", "--monitor", "m"]
        if self._tls:
            credentials = f"tls-creds-x509,id=tls,dir={self._tls},endpoint=server,verify-peer=on"
            options += ["--object", credentials]
            listens += ",tls-creds=tls"
        return [*options, "--nbd-server", listens]

    async def _connected(self, path: Path) -> Monitor:
        """Its monitor greets once all of its options were carried out."""
        assert self._process is not None
        ends_at = asyncio.get_running_loop().time() + START_S
        while True:
            try:
                return await Monitor.connect(path, allowed=ALLOWED)
            except FlushpointError as error:
                if self._process.returncode is None and asyncio.get_running_loop().time() < ends_at:
                    await asyncio.sleep(0.05)
                    continue
                why = await self._last_words() or error.message
                raise UnavailableError(
                    f"the relay cannot listen on {self._host}:{self._port}: {why}",
                    "set FLUSHPOINT_RELAY_HOST and FLUSHPOINT_RELAY_PORT, and look at FLUSHPOINT_RELAY_TLS_DIR",
                ) from error

    async def _last_words(self) -> str:
        if self._process is None or self._process.stderr is None or self._process.returncode is None:
            return ""
        return " ".join((await self._process.stderr.read()).decode(errors="replace").split())

    async def _keep(self) -> None:
        """Start it anew whenever it has died."""
        while True:
            assert self._process is not None
            await self._process.wait()
            log.warning("the relay died", why=await self._last_words())
            async with self._order:
                await self._end()
                while self._monitor is None:
                    await asyncio.sleep(AGAIN_S)
                    with contextlib.suppress(FlushpointError):
                        await self._start()
                for name, image in self._offered.items():
                    with suppress_and_tell(name):
                        await self._add(self._monitor, name, image)

    async def _end(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.close()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _add(self, monitor: Monitor, name: str, image: Path) -> None:
        node = _node_of(name)
        file = {"driver": "file", "filename": str(image), "read-only": True}
        await monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "read-only": True, "file": file})
        export = {"type": "nbd", "id": node, "node-name": node, "name": name, "allocation-depth": True}
        await monitor.execute("block-export-add", export)

    async def _remove(self, monitor: Monitor, name: str) -> None:
        node = _node_of(name)
        await monitor.execute("block-export-del", {"id": node, "mode": "hard"})
        async with asyncio.timeout(END_S):
            while any(export["id"] == node for export in await monitor.execute("query-block-exports")):
                await asyncio.sleep(0.02)  # a client is just being sent away
        await monitor.execute("blockdev-del", {"node-name": node})


@contextlib.contextmanager
def suppress_and_tell(name: str) -> Iterator[None]:
    """One image that cannot be offered any more takes no other with it; a relay that died is started again."""
    try:
        yield
    except FlushpointError as error:
        log.warning("an image cannot be offered", export=name, error=str(error))


def _node_of(name: str) -> str:
    """QEMU takes 31 characters, and an export's name may be longer."""
    return f"s{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}"
