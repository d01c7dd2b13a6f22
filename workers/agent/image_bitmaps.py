"""Dirty bitmaps of qcow2 images that nobody has open, by qemu-img; and which parts of a chain lie above a base.

A bitmap is filled by way of a scratch image: zeroes are written there, under a bitmap that records them, wherever the
chain is allocated above the base, and that bitmap is merged into the one to be filled::

    chain      base ···▒▒▒▒▒▒····   top ··▓▓······▓▓··
    scratch                             ··00······00··      its bitmap: the same places
    merged                              NAME |= that bitmap
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.extent import Extent, Status
from coordinator.model.job import Sync
from coordinator.model.point import TRACKING
from workers.access import Access
from workers.nbd.session import DEFAULT_LIMITS
from workers.qemu.image import Image, inspect, qemu_img, refusal
from workers.sources.qcow2 import Qcow2Source

FILL = "fill"
"""Name of the scratch image's bitmap."""
_EVERYTHING = Access(["/"], [])
"""Of the user who gives the command, on a machine of his."""
_WRITE_S = 60.0


@dataclass(frozen=True, slots=True)
class DirtyBitmap:
    """`dirty` is in bytes, None where it cannot be told; `granularity` too is in bytes."""

    name: str
    granularity: int
    is_recording: bool
    is_persistent: bool
    is_inconsistent: bool
    dirty: int | None


class Bitmaps(Protocol):
    """Of one disk; names are of bitmaps that it has, but for `add`. Errors as QEMU and its tools say them."""

    async def all(self) -> list[DirtyBitmap]: ...
    async def add(self, name: str, granularity: int) -> None:
        """One that records from now on, with a `granularity` in bytes, or QEMU's choice for 0."""

    async def enable(self, name: str) -> None: ...
    async def disable(self, name: str) -> None: ...
    async def remove(self, name: str) -> None: ...
    async def fill(self, name: str, base: str) -> None:
        """Add what the chain holds above the image `base`; "": what the topmost image holds."""


class ImageBitmaps:
    """Those of an image of qcow2 that no other process writes. Called like those of a guest; every call blocks."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def all(self) -> list[DirtyBitmap]:
        found = inspect(self._path, _EVERYTHING).bitmaps
        return [
            DirtyBitmap(b.name, b.granularity, b.enabled, True, b.inconsistent, self._dirty(b.name, b.inconsistent))
            for b in found
        ]

    async def add(self, name: str, granularity: int) -> None:
        size = ["-g", str(granularity)] if granularity else []
        self._do("--add", *size, "--", self._path, name)

    async def enable(self, name: str) -> None:
        self._do("--enable", "--", self._path, name)

    async def disable(self, name: str) -> None:
        self._do("--disable", "--", self._path, name)

    async def remove(self, name: str) -> None:
        self._do("--remove", "--", self._path, name)

    async def fill(self, name: str, base: str) -> None:
        (granularity,) = [b.granularity for b in await self.all() if b.name == name]
        image = inspect(self._path, _EVERYTHING)
        with scratch_of(allocated_above(image, base), image.virtual_size, granularity) as scratch:
            self._do("--merge", FILL, "-b", str(scratch), "-F", "qcow2", "--", self._path, name)

    def _dirty(self, name: str, is_inconsistent: bool) -> int | None:
        if is_inconsistent:
            return None
        source = Qcow2Source(self._path, Sync.DIRTY, name, _EVERYTHING, DEFAULT_LIMITS)
        try:
            return sum(extent.length for extent in source.extents(0, source.size))
        finally:
            source.close()

    def _do(self, *words: str) -> None:
        qemu_img("bitmap", *words)


def allocated_above(image: Image, base: str) -> Iterator[Extent]:
    """What the images of the chain above `base` hold, zeroes among it; "" is the topmost image alone. Of an image that
    a guest writes, what that guest's QEMU has flushed. NotFoundError for a base that is not in the chain."""
    chain = [one.path for one in image.chain()]
    base = os.path.realpath(base) if base else ""
    if base and base not in chain[1:]:
        there = ", ".join(chain[1:]) or "none"
        raise NotFoundError(f"{base} is no backing file of {image.path}", f"it stands on: {there}")
    above = chain.index(base) if base else 1
    node = "json:" + json.dumps(image.node())
    for entry in json.loads(qemu_img("map", "--output=json", "--force-share", node)):
        if entry["present"] and entry["depth"] < above:
            yield Extent(int(entry["start"]), int(entry["length"]), Status.DATA)


@contextmanager
def scratch_of(extents: Iterator[Extent], size: int, granularity: int) -> Iterator[Path]:
    """An image of this size (bytes) whose bitmap FILL names the extents."""
    with TemporaryDirectory(prefix="flushpoint-bitmap-") as directory:
        path = Path(directory) / "scratch.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "--", str(path), str(size))
        qemu_img("bitmap", "--add", "-g", str(granularity), "--", str(path), FILL)
        commands = [f"write -q -z {extent.offset} {extent.length}" for extent in extents]
        if commands:
            _qemu_io(path, commands)
        yield path


def _qemu_io(path: Path, commands: Sequence[str]) -> None:
    command = ["qemu-io", "-f", "qcow2", str(path)]
    done = subprocess.run(
        command, input="\n".join(commands), capture_output=True, text=True, timeout=_WRITE_S, check=False
    )
    if done.returncode != 0 or "error" in done.stdout.lower():  # of commands it reads it ignores what became of them
        raise refusal(done.stderr or done.stdout, command)


def refuse_ours(name: str) -> None:
    """RefusedError for a bitmap by which recovery points are made: what it says is nobody else's to change."""
    if name.startswith(TRACKING):
        raise RefusedError(f"{name} is one of Flushpoint's own bitmaps", "name one of yours; remove is all that may be")
