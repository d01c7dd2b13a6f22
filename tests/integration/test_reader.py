"""What reads a guest for movers, before a qemu-nbd in the place of a guest's QEMU."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.model.epoch import DiskCopy
from coordinator.model.errors import DiskIOError, FlushpointError, UnavailableError
from coordinator.model.job import Sync
from coordinator.model.uri import parse
from tests.certificates import make_pki
from tests.guards import serving_guard
from tests.stack import Process, accepts, wait_until
from workers.access import Access
from workers.agent.fleece import Fleece
from workers.agent.reader import ReadDisk
from workers.agent.readers import Reader, Readers
from workers.agent.stage import BITMAP
from workers.nbd import wire
from workers.nbd.connection import connect
from workers.nbd.endpoint import Endpoint, Tls
from workers.sources import open_source

pytestmark = pytest.mark.needs("qemu-nbd", "qemu-img", "qemu-io", "openssl")

MIB = 1024 * 1024
SIZE = 64 * MIB
NAME = "shop@7/db/vda"
WRITTEN = 1 * MIB
"""Since the bitmap was there, in the middle of older data."""


@pytest.fixture
def guard(tmpfs_path: Path) -> Iterator[Path]:
    with serving_guard(tmpfs_path / "guard") as path:
        yield path


@pytest.fixture
def guest(tmpfs_path: Path) -> Iterator[Process]:
    """One connection at a time, as a fleece has for a disk."""
    image, socket = tmpfs_path / "image.qcow2", tmpfs_path / "nbd"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    run("qemu-io", "-c", "write -P 1 0 32M", image)
    run("qemu-img", "bitmap", "--add", "-g", "64k", image, BITMAP)
    run("qemu-io", "-c", f"write -P 2 {WRITTEN} 64k", "-c", f"write -z {16 * MIB} 128k", image)
    options = ["--persistent", "--shared=1", "--read-only", f"--bitmap={BITMAP}", "--export-name=vda"]
    process = Process(["qemu-nbd", *options, f"--socket={socket}", "-f", "qcow2", str(image)], tmpfs_path / "log")
    try:
        wait_until(socket.exists, "qemu-nbd")
        yield process
    finally:
        process.kill()


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=30)


@asynccontextmanager
async def started(readers: Readers) -> AsyncIterator[Reader]:
    """Until it is killed, at the end of the block at the latest."""
    fleece = Fleece(Path("/run/db.qmp"), readers.scratch)
    reader = await readers.start(fleece, [ReadDisk(name=NAME, size=SIZE, export="vda")])
    try:
        yield reader
    finally:
        await reader.kill()


def changed(uri: str) -> list[tuple[int, int, bool]]:
    """(offset, length, whether it reads as zeroes) of what a mover copies."""
    source = open_source(parse(uri), Sync.TOP, None, Access(["/"], ["*"]))
    try:
        return [(e.offset, e.length, e.reads_as_zeroes) for e in source.extents(0, source.size)]
    finally:
        source.close()


def block(uri: str) -> bytes:
    with connect(Endpoint.parse(uri)) as reading:
        data = bytearray(64 * 1024)
        reading.read_into(WRITTEN, memoryview(data))
    return bytes(data)


def test_movers_here_and_elsewhere_see_what_changed(guest: Process, guard: Path, tmpfs_path: Path) -> None:
    pki, anonymous = make_pki(tmpfs_path, "IP:127.0.0.1"), tmpfs_path / "anonymous"
    anonymous.mkdir()
    shutil.copy(pki / "ca-cert.pem", anonymous)

    async def check() -> None:
        async with started(Readers(guard, tmpfs_path, "127.0.0.1", str(pki))) as reader:
            await see(reader)

    async def see(reader: Reader) -> None:
        far = Endpoint.parse(reader.uri_of(NAME))
        assert far.tls == Tls()
        stranger = replace(far, tls=Tls(certificates=str(anonymous)))
        with pytest.raises(FlushpointError):
            await asyncio.to_thread(connect, stranger)
        known = str(replace(far, tls=Tls(certificates=str(pki))))
        for uri in (reader.path_of(NAME), known):
            assert await asyncio.to_thread(changed, uri) == [(WRITTEN, 65536, False), (16 * MIB, 131072, True)]
            assert await asyncio.to_thread(block, uri) == b"\2" * 65536

    asyncio.run(check())


def test_movers_that_leave_replies_unread_keep_nothing_from_the_guest_waiting(
    guest: Process, guard: Path, tmpfs_path: Path
) -> None:
    """More of them than a reader has threads; others are served meanwhile."""

    async def check() -> None:
        async with started(Readers(guard, tmpfs_path)) as reader:
            await see(reader.path_of(NAME))

    async def see(path: str) -> None:
        with ExitStack() as stack:
            for _ in range(12):
                frozen = stack.enter_context(connect(Endpoint.parse(path)))
                sock = stack.enter_context(frozen.channel.exclusive())
                for at in range(4):
                    sock.sendall(wire.encode_request(0, wire.Command.READ, at, at * 4 * MIB, 4 * MIB))
            assert await asyncio.to_thread(block, path) == b"\2" * 65536

    asyncio.run(check())


def test_who_reads_what_is_gone_hears_why(guest: Process, guard: Path, tmpfs_path: Path) -> None:
    """At the places that were told before, also from an agent that knows of them by the ledger alone."""

    async def check() -> None:
        readers = Readers(guard, tmpfs_path, "127.0.0.1")
        async with started(readers) as reader:
            path, uri = reader.path_of(NAME), reader.uri_of(NAME)
            guest.kill()
            with pytest.raises(DiskIOError, match="the view broke, or its guest has ended"):
                await asyncio.to_thread(block, path)
        assert not accepts(reader.reading.path)
        copy = DiskCopy(disk="vda", path=path, uri=uri, size=SIZE, since=6)
        refusing = await readers.refuse(readers.told_of([copy]), "it was held for too long")
        try:
            for place, look in itertools.product((path, uri), (block, changed)):
                with pytest.raises(DiskIOError, match="it was held for too long"):
                    await asyncio.to_thread(look, place)
        finally:
            await refusing.kill()

    asyncio.run(check())


def test_nobody_reads_without_a_guard(guest: Process, tmpfs_path: Path) -> None:
    async def check() -> None:
        with pytest.raises(UnavailableError, match="no reader of a view can be started: no guard answers"):
            async with started(Readers(tmpfs_path / "guard", tmpfs_path)):
                pass

    asyncio.run(check())
