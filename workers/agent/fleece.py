"""Fleece: views of a guest's disks, read straight from its QEMU, which exports them by NBD.

::

    device ── cbw ── node
               └──── acc (snapshot-access) ── export, with a bitmap of what changed ── unix socket ──> reader

A QEMU has one NBD server. Where it runs already it is somebody else's, and is left alone: then there is no fleece. Who
reads is a process of this host that the guard may kill, and nobody else (reader.py): replies that a frozen client
leaves unread keep QEMU from answering a `stop`.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from coordinator.model.errors import UnavailableError
from workers.agent.guest import OURS
from workers.agent.monitor import GuestRefusedError, Monitor
from workers.agent.stage import BITMAP, merge
from workers.agent.views import IN_USE_S, View, lend, write_durably

_RECORD = ".fleece.json"
_EXPORT = f"{OURS}export-"
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Fleece:
    """An NBD server in one guest, for the views of one epoch."""

    monitor: Path
    directory: Path
    """The guest's QEMU makes its socket in there, so it is lent to it."""
    process: str = ""
    """Of that QEMU."""

    @property
    def socket(self) -> Path:
        return self.directory / "nbd"


class _Record(BaseModel):
    """What an agent that starts has to know of a fleece."""

    fleece: Fleece


async def begin(monitor: Monitor, scratch: Path, disks: int) -> Fleece:
    """Let the guest's QEMU listen, for as many connections as there are disks. GuestRefusedError if a server runs in it
    already; UnavailableError if there is no room for a record of it."""
    fleece = Fleece(monitor.path, scratch / f"{secrets.token_hex(4)}.fleece", monitor.process())
    try:
        await asyncio.to_thread(_make, monitor, fleece)
        address = {"type": "unix", "data": {"path": str(fleece.socket)}}
        await monitor.execute("nbd-server-start", {"addr": address, "max-connections": disks})
    except GuestRefusedError:
        forget(fleece)
        raise
    except BaseException:
        await end(monitor, fleece)
        raise
    return fleece


async def export(monitor: Monitor, fleece: Fleece, view: View, changed: tuple[str, ...]) -> None:
    """Let a view be read, together with what bitmaps say was written. GuestRefusedError."""
    await merge(monitor, view, changed)
    name = export_of(fleece, view)
    what = {"type": "nbd", "id": name, "name": name, "node-name": view.access, "bitmaps": [BITMAP]}
    await monitor.execute("block-export-add", what)


def export_of(fleece: Fleece, view: View) -> str:
    return f"{_exports_of(fleece)}{view.mark}"


def _exports_of(fleece: Fleece) -> str:
    """How their names begin."""
    return f"{_EXPORT}{fleece.directory.stem}-"


async def end(monitor: Monitor, fleece: Fleece) -> None:
    """Nobody reads the guest any more, and nothing of its QEMU listens; views can be removed. Of what is there alone,
    any number of times. UnavailableError if an export does not go; then the fleece is still remembered."""
    ours = await _exports(monitor, fleece)
    for name in ours:
        await monitor.execute("block-export-del", {"id": name, "mode": "hard"})
    ends_at = asyncio.get_running_loop().time() + IN_USE_S
    while ours and await _exports(monitor, fleece):  # a client is just being sent away
        if asyncio.get_running_loop().time() > ends_at:
            raise UnavailableError(f"{monitor.path} does not let go of {ours[0]}", "look whether its QEMU hangs")
        await asyncio.sleep(_LOOK_S)
    if monitor.process() == fleece.process and fleece.socket.exists():  # nobody else makes that socket: it is ours
        await monitor.execute("nbd-server-stop")
    forget(fleece)


async def _exports(monitor: Monitor, fleece: Fleece) -> list[str]:
    exports = await monitor.execute("query-block-exports")
    return [str(export["id"]) for export in exports if str(export["id"]).startswith(_exports_of(fleece))]


def remembered(scratch: Path) -> Iterator[Fleece]:
    """All that an agent before this one has left. One whose guest has ended since is to be forgotten."""
    for path in sorted(scratch.glob(f"*{_RECORD}")):
        try:
            yield _Record.model_validate_json(path.read_bytes()).fleece
        except ValueError:  # cut off by a crash: nothing was done to the guest yet
            path.unlink()


def forget(fleece: Fleece) -> None:
    """Its guest has ended, or nothing of it is left in there."""
    shutil.rmtree(fleece.directory, ignore_errors=True)
    _record_of(fleece).unlink(missing_ok=True)


def _record_of(fleece: Fleece) -> Path:
    return fleece.directory.with_suffix(_RECORD)


def _make(monitor: Monitor, fleece: Fleece) -> None:
    """Durable before anything is done to the guest."""
    write_durably(_record_of(fleece), _Record(fleece=fleece).model_dump_json())
    try:
        fleece.directory.mkdir(mode=0o700)
    except OSError as error:
        raise UnavailableError(
            f"no directory can be made in {fleece.directory.parent}: {error.strerror}", "make room there"
        ) from error
    lend(monitor, fleece.directory)
