"""Room on the scratch directory's disk: looked after, so that it is an epoch that ends and not a view that breaks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import RefusedError, UnavailableError

LOOK_S = 0.5
_GIB = 1024**3
_SLICE_UNIT = 1024**2
_SECTOR = 512
"""What stat(2) counts blocks in."""


@dataclass(frozen=True, slots=True)
class Room:
    """`reserve` bytes are to stay free, and the scratch image of one view may take `view_limit`; 0: any number."""

    directory: Path
    reserve: int
    view_limit: int = 0

    def refuse_unless_enough(self) -> None:
        """RefusedError; before anything is made there."""
        if self._free() < self.reserve:
            raise RefusedError(*self._said())

    def left(self) -> int:
        """Bytes that may still be taken."""
        return max(0, self._free() - self.reserve)

    def slice(self, limit: int, sharers: int) -> int:
        """How many bytes of a disk one of `sharers` may copy there now, at most `limit` (0: any number). Half of the
        room is for what guests write meanwhile. A multiple of what images are written in: of a part of it, the next
        slice would overwrite with zeroes what this one has copied."""
        share = self.left() // (2 * sharers)
        most = min(limit, share) if limit else share
        return max(_SLICE_UNIT, most - most % _SLICE_UNIT)

    async def watch(self, views: Sequence[Path]) -> None:
        """Until there is not enough any more, or one of these scratch images takes too much: UnavailableError. Never
        returns."""
        while self._free() >= self.reserve:
            for view in views:
                self._check(view)
            await asyncio.sleep(LOOK_S)
        raise UnavailableError(*self._said())

    def _check(self, view: Path) -> None:
        with suppress(FileNotFoundError):  # it was staged, and is gone
            taken = view.stat().st_blocks * _SECTOR
            if 0 < self.view_limit < taken:
                raise UnavailableError(
                    f"the view at {view} takes {taken / _GIB:.2f} GiB of scratch, and may take"
                    f" {self.view_limit / _GIB:.2f}",
                    "copy at a time when the guest writes less, or raise FLUSHPOINT_VIEW_LIMIT",
                )

    def _free(self) -> int:
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def _said(self) -> tuple[str, str]:
        free, reserve = self._free() / _GIB, self.reserve / _GIB
        return (
            f"the scratch directory {self.directory} has {free:.1f} GiB free, and {reserve:.1f} GiB are to stay so",
            "make room there, name another, or lower FLUSHPOINT_SCRATCH_RESERVE",
        )
