"""A target that takes whole blocks only, made to take any bytes: edges are read, changed and written back.

Sources end at odd sizes and have extents that know nothing of the target's blocks. Work units share no block of a
target (they are whole segments), so only threads of one process can meet at an edge, and a lock keeps them apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from coordinator.model.extent import Extent, Status
from workers.nbd.endpoint import Endpoint
from workers.sources.identity import Identity
from workers.targets.contract import Target


class AlignedTarget:
    """Wraps a target whose `block_size` is above 1. `size` must be a multiple of it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._block = target.block_size
        self._edges = threading.Lock()
        self.size = target.size
        self.block_size = 1
        self.max_writers = target.max_writers

    @property
    def can_zero(self) -> bool:
        return self._target.can_zero

    def write(self, offset: int, data: memoryview) -> None:
        head, body, tail = self._split(offset, len(data))
        self._change(offset, data[:head])
        if body:
            self._target.write(offset + head, data[head : head + body])
        self._change(offset + head + body, data[len(data) - tail :])

    def write_zeroes(self, offset: int, length: int) -> None:
        head, body, tail = self._split(offset, length)
        self._change(offset, memoryview(bytes(head)))
        if body:
            self._target.write_zeroes(offset + head, body)
        self._change(offset + head + body, memoryview(bytes(tail)))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        head, body, tail = self._split(offset, len(buffer))
        self._peek(offset, buffer[:head])
        if body:
            self._target.read_into(offset + head, buffer[head : head + body])
        self._peek(offset + head + body, buffer[len(buffer) - tail :])

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Asked for whole blocks, answered for the range; what an edge's block holds is not known."""
        head, body, tail = self._split(offset, length)
        if head:
            yield Extent(offset, head, Status.DATA)
        if body:
            yield from self._target.extents(offset + head, body)
        if tail:
            yield Extent(offset + head + body, tail, Status.DATA)

    def flush(self) -> None:
        self._target.flush()

    def identity(self) -> Identity:
        return self._target.identity()

    def fileno(self) -> int | None:
        return self._target.fileno()

    def nbd_endpoint(self) -> Endpoint | None:
        return self._target.nbd_endpoint()

    def abort(self) -> None:
        self._target.abort()

    def close(self) -> None:
        self._target.close()

    def _split(self, offset: int, length: int) -> tuple[int, int, int]:
        """Lengths of the partial head, of the whole blocks, and of the partial tail."""
        head = min(length, -offset % self._block)
        tail = (length - head) % self._block
        return head, length - head - tail, tail

    def _change(self, offset: int, data: memoryview) -> None:
        """Write less than a block, all of it within one."""
        if len(data) == 0:
            return
        start = offset // self._block * self._block
        whole = memoryview(bytearray(self._block))
        with self._edges:
            self._target.read_into(start, whole)
            whole[offset - start : offset - start + len(data)] = data
            self._target.write(start, whole)

    def _peek(self, offset: int, buffer: memoryview) -> None:
        if len(buffer) == 0:
            return
        start = offset // self._block * self._block
        whole = memoryview(bytearray(self._block))
        self._target.read_into(start, whole)
        buffer[:] = whole[offset - start : offset - start + len(buffer)]
