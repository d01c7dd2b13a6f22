"""A run: one block as it is stored, compressed where that pays, sealed where the repository is encrypted.

A run's context when sealed is the repository's id and the block's keyed digest, not its place: so that one run serves
equal blocks anywhere, and compaction may move it. Its place is authenticated by the map that names it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import zstandard

from coordinator.model.extent import BLOCK_BYTES
from workers.repository.expand import expanded
from workers.repository.keyring import Keyring
from workers.repository.layout import DamageError, pack_key
from workers.repository.store.contract import Buffer

PAYS = 0.95
"""A block is stored compressed only if it shrinks at least to this share: less is not worth decompressing."""
_PROBE_BYTES = 4096
_local = threading.local()


@dataclass(frozen=True, slots=True)
class Run:
    """Where a block is stored: `length` bytes at `offset` of `pack`; `raw` if not compressed."""

    pack: bytes
    offset: int
    length: int
    raw: bool
    digest: bytes


@dataclass(frozen=True, slots=True)
class Squeezed:
    """A block on its way into a pack; `data` may be a view of a buffer that is reused later."""

    digest: bytes
    data: Buffer
    raw: bool


class Squeezer:
    """Compresses blocks. Thread-safe; after a block that did not shrink, the next is only probed."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._doubtful = False

    def squeeze(self, block: memoryview, digest: bytes) -> Squeezed:
        if self._doubtful and not self._probe(block):
            return Squeezed(digest, block, raw=True)
        packed = self._compress(block)
        self._doubtful = len(packed) > len(block) * PAYS
        return Squeezed(digest, block, raw=True) if self._doubtful else Squeezed(digest, packed, raw=False)

    def _probe(self, block: memoryview) -> bool:
        """Whether a piece of its middle shrinks."""
        start = max(0, len(block) - _PROBE_BYTES) // 2
        piece = block[start : start + _PROBE_BYTES]
        return len(self._compress(piece)) < len(piece) * PAYS

    def _compress(self, data: memoryview) -> bytes:
        compressor: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
        if compressor is None or _local.level != self._level:
            compressor = zstandard.ZstdCompressor(self._level, write_content_size=False, write_checksum=False)
            _local.compressor, _local.level = compressor, self._level
        return compressor.compress(data)


def context_of(repository: bytes, digest: bytes) -> bytes:
    return repository + digest


def open_run(stored: Buffer, run: Run, length: int, keyring: Keyring) -> Buffer:
    """The block of `length` bytes that was stored as `run`; DamageError if it is not that."""
    key = pack_key(run.pack)
    try:
        data = keyring.open(run.pack, run.offset, stored, context_of(keyring.repository, run.digest))
        block = data if run.raw else expanded(data, BLOCK_BYTES)
    except ValueError as error:
        raise DamageError("a run", key, run.offset, run.length) from error
    if len(block) != length or keyring.digest(block) != run.digest:
        raise DamageError("a run", key, run.offset, run.length)
    return block
