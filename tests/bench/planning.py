"""Plans a 16 TiB disk with a million scattered dirty extents, in a process of its own so that its memory can be told.

`python -m tests.bench.planning model COUNT` splits extents that a generator makes;
`python -m tests.bench.planning nbd COUNT` asks QEMU's NBD server for a real bitmap through our source.
Both print JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordinator.model.extent import BLOCK_BYTES, Extent, Status
from coordinator.model.job import Sync
from coordinator.model.units import plan_units
from coordinator.model.uri import parse
from tests.demo.lab import LabError, peak_memory, wait_until

DISK_BYTES = 16 * 1024**4
BITMAP = "scattered"
START_S = 10.0
_BATCH = 512
"""Requests sent before their answers are read: 14 KiB, which any socket buffer holds."""


@dataclass(frozen=True, slots=True)
class Planned:
    extents: int
    units: int
    seconds: float
    peak_bytes: int
    """Largest resident size of the whole process, interpreter and libraries included."""
    growth_bytes: int
    """How much of it came with planning."""


def dirty_offsets(count: int) -> Iterator[int]:
    """`count` blocks spread evenly over the disk, no two of them neighbours."""
    stride = DISK_BYTES // count // BLOCK_BYTES * BLOCK_BYTES
    return (n * stride for n in range(count))


def plan(extents: Iterable[Extent]) -> Planned:
    before = peak_memory(os.getpid())
    begin = time.monotonic()
    units = found = 0
    for unit in plan_units(extents, DISK_BYTES):
        units += 1
        found += len(unit.extents)
    seconds = time.monotonic() - begin
    peak = peak_memory(os.getpid())
    return Planned(found, units, seconds, peak, peak - before)


def plan_model(count: int) -> Planned:
    return plan(Extent(offset, BLOCK_BYTES, Status.DIRTY) for offset in dirty_offsets(count))


def plan_nbd(count: int) -> Planned:
    from workers.access import Access
    from workers.sources import open_source

    with tempfile.TemporaryDirectory(prefix="flushpoint-plan-") as directory, _Daemon(Path(directory)) as daemon:
        daemon.make_bitmap(count)
        uri = f"nbd+unix:///bitmap?socket={daemon.nbd}"
        source = open_source(parse(uri), Sync.DIRTY, BITMAP, Access((directory,), ("*",)))
        try:
            planned = plan(source.extents(0, source.size))
        finally:
            source.close()
    if planned.extents != count:
        raise LabError(f"{count} blocks were dirtied, {planned.extents} were planned")
    return planned


class _Daemon:
    """A qemu-storage-daemon with an empty disk whose bitmap is written through NBD."""

    def __init__(self, directory: Path) -> None:
        self.nbd = directory / "nbd.sock"
        self._qmp = directory / "qmp.sock"

    def __enter__(self) -> _Daemon:
        self._process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"null-co,node-name=disk,size={DISK_BYTES},read-zeroes=on"),
                *("--chardev", f"socket,id=qmp,path={self._qmp},server=on,wait=off", "--monitor", "chardev=qmp"),
                *("--nbd-server", f"addr.type=unix,addr.path={self.nbd},max-connections=0"),
            ],
            stdin=subprocess.DEVNULL,
        )
        try:
            if not wait_until(lambda: self._qmp.exists() and self.nbd.exists(), START_S):
                raise LabError("qemu-storage-daemon did not start")
            self._monitor = socket.socket(socket.AF_UNIX)
            self._monitor.settimeout(START_S)
            self._monitor.connect(str(self._qmp))
            self._answers = self._monitor.makefile("r")
            self._answers.readline()
            self._do("qmp_capabilities")
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._monitor.close()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(START_S)
            return
        self._process.kill()
        self._process.wait()

    def make_bitmap(self, count: int) -> None:
        bitmap = {"node": "disk", "name": BITMAP}
        self._do("block-dirty-bitmap-add", {**bitmap, "granularity": BLOCK_BYTES})
        export = {"type": "nbd", "id": "fill", "node-name": "disk", "name": "fill", "writable": True}
        self._do("block-export-add", export)
        _write_zeroes(self.nbd, "fill", dirty_offsets(count))
        self._do("block-dirty-bitmap-disable", bitmap)
        export = {"type": "nbd", "id": "bitmap", "node-name": "disk", "name": "bitmap", "bitmaps": [BITMAP]}
        self._do("block-export-add", export)

    def _do(self, command: str, arguments: dict[str, Any] | None = None) -> None:
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n")
        while True:
            answer = json.loads(self._answers.readline())
            if "error" in answer:
                raise LabError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return


def _write_zeroes(path: Path, export: str, offsets: Iterator[int]) -> None:
    """Dirty one sector at each offset. The oldest handshake there is, and requests in batches (NBD proto.md)."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    with connection:
        connection.connect(str(path))
        answers = connection.makefile("rb")
        answers.read(18)
        name = export.encode()
        connection.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)  # NBD_OPT_EXPORT_NAME
        answers.read(10)
        batch: list[bytes] = []
        for offset in offsets:
            batch.append(struct.pack(">IHHQQI", 0x25609513, 0, 6, offset, offset, 512))  # NBD_CMD_WRITE_ZEROES
            if len(batch) == _BATCH:
                _send(connection, answers.read, batch)
        _send(connection, answers.read, batch)
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))  # NBD_CMD_DISC
        answers.close()


def _send(connection: socket.socket, read: Any, batch: list[bytes]) -> None:
    connection.sendall(b"".join(batch))
    replies = read(16 * len(batch))
    for n in range(len(batch)):
        magic, error = struct.unpack_from(">II", replies, n * 16)
        if (magic, error) != (0x67446698, 0):
            raise LabError(f"qemu-storage-daemon answered a write with error {error}")
    batch.clear()


if __name__ == "__main__":
    print(json.dumps(asdict({"model": plan_model, "nbd": plan_nbd}[sys.argv[1]](int(sys.argv[2])))))
