"""Zeroes written by hand, where a disk cannot be told to zero a range."""

from __future__ import annotations

from collections.abc import Callable

_ZEROES = memoryview(bytes(1024 * 1024))


def write_zero_bytes(write: Callable[[int, memoryview], None], offset: int, length: int) -> None:
    """`length` zero bytes from `offset`, through `write`, at most 1 MiB a call.

    Sees neither a pause nor the job's speed: the copy engine asks a target that cannot zero for no more at once.
    """
    end = offset + length
    while offset < end:
        step = min(len(_ZEROES), end - offset)
        write(offset, _ZEROES[:step])
        offset += step
