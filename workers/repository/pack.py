"""A pack: the immutable object that one work unit writes.

    head     magic "FPPACK\\0\\1" | repository 16 | pack 16 | key 16 | epoch u64 | length of group u8 | group
    runs     one after the other, sealed
    maps     of the segments the unit touched, sealed
    footer   what is where, compressed and sealed (see `_encode_footer`)
    tail     offset of footer u64 | its length u32 | BLAKE3 of all that is before the tail, 32 | magic "FPPEND\\0\\1"

Key is the id of the data key, or 16 zero bytes. Head, tail and the digest are plain, so that a pack can be told whole
without any key, and whose it is by its first bytes. All numbers are little-endian.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import blake3
import zstandard

from workers.repository import segment_map
from workers.repository.expand import expanded
from workers.repository.keyring import Keyring
from workers.repository.layout import DIGEST_BYTES, ID_BYTES, DamageError, pack_key, read_range
from workers.repository.runs import Run, Squeezed, context_of
from workers.repository.segment_map import MAP_DIGEST_BYTES, MapRef
from workers.repository.store.contract import Buffer, ObjectStore, Upload

_MAGIC = b"FPPACK\0\1"
_END = b"FPPEND\0\1"
_HEAD = struct.Struct(f"<8s{ID_BYTES}s{ID_BYTES}s{ID_BYTES}sQB")
_TAIL = struct.Struct(f"<QI{DIGEST_BYTES}s8s")
_FOOTER = struct.Struct("<HIII")
_RUN = struct.Struct(f"<II{DIGEST_BYTES}s")
_MAP = struct.Struct(f"<HQIIH{MAP_DIGEST_BYTES}s")
HEAD_BYTES = _HEAD.size + 255
"""What to read to be sure of all of a head."""
MAX_PACK_BYTES = 1 << 31
"""Offsets in maps are 32 bits wide."""
MAX_FOOTER_BYTES = 256 * 1024 * 1024
"""Of a footer, decompressed: a unit that discards all of a full 16 TiB disk names each of its segments, in 88 MB."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose epoch a pack was written for: until that is decided, nobody may remove it."""

    group: str
    epoch: int


@dataclass(frozen=True, slots=True)
class PackRef:
    """A finished pack, as its unit tells the ledger. Text: "ID:OFFSET:LENGTH" of the footer."""

    pack: bytes
    footer_offset: int
    footer_length: int

    def __str__(self) -> str:
        return f"{self.pack.hex()}:{self.footer_offset}:{self.footer_length}"

    @classmethod
    def parse(cls, text: str) -> Self:
        pack, offset, length = text.split(":")
        return cls(bytes.fromhex(pack), int(offset), int(length))


@dataclass(frozen=True, slots=True)
class PackHead:
    pack: bytes
    key: bytes
    origin: Origin


@dataclass(frozen=True, slots=True)
class StoredRun:
    offset: int
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class StoredMap:
    disk: str
    ref: MapRef


@dataclass(frozen=True, slots=True)
class Contents:
    """What a footer says."""

    runs: tuple[StoredRun, ...]
    maps: tuple[StoredMap, ...]


class PackWriter:
    """Writes one pack. The object is begun with the first run or map: without any, there is none.

    A context manager: left without `close`, nothing of it becomes visible. Not thread-safe.
    """

    def __init__(self, store: ObjectStore, keyring: Keyring, origin: Origin) -> None:
        self._store = store
        self._keyring = keyring
        self._origin = origin
        self.pack = secrets.token_bytes(ID_BYTES)
        self._seal = keyring.seal(self.pack)
        self._upload: Upload | None = None
        self._hash = blake3.blake3()
        self.runs: list[Run] = []
        """What was stored so far."""
        self._maps: list[StoredMap] = []
        self.size = 0
        """Bytes written so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._upload is not None:
            self._upload.__exit__(kind, error, trace)

    def add_run(self, block: Squeezed) -> Run:
        """Store a block. What `block.data` views may be reused when this returns."""
        self._begin()
        context = context_of(self._keyring.repository, block.digest)
        offset, length = self._append(self._seal.seal(self.size, block.data, context))
        run = Run(self.pack, offset, length, block.raw, block.digest)
        self.runs.append(run)
        return run

    def add_sealed_run(self, run: Run, plain: Buffer) -> Run:
        """Store what `run` holds anew, as compaction does: `plain` is what its seal opened to."""
        return self.add_run(Squeezed(run.digest, plain, run.raw))

    def add_map(self, disk: str, segment: int, plain: Buffer, packs: tuple[bytes, ...]) -> MapRef:
        """Store the encoded map of a segment whose runs are in `packs`; an empty one says: it reads as zeroes."""
        self._begin()
        if len(plain) == 0:
            ref = segment_map.zero_ref(segment)
        else:
            sealed = self._seal.seal(self.size, plain, map_context(self._keyring.repository, disk, segment))
            offset, length = self._append(sealed)
            ref = MapRef(segment, self.pack, offset, length, map_digest(self._keyring, plain), packs)
        self._maps.append(StoredMap(disk, ref))
        return ref

    def close(self) -> PackRef | None:
        """Make the pack visible and durable; None if nothing was added."""
        if self._upload is None:
            return None
        footer = _encode_footer(self.runs, self._maps)
        context = footer_context(self._keyring.repository, self.pack)
        offset, length = self._append(self._seal.seal(self.size, footer, context))
        self._upload.write(_TAIL.pack(offset, length, self._hash.digest(), _END))
        self._upload.commit()
        return PackRef(self.pack, offset, length)

    def _begin(self) -> None:
        if self._upload is not None:
            return
        self._upload = self._store.upload(pack_key(self.pack))
        self._upload.__enter__()
        group = self._origin.group.encode()
        repository, key = self._keyring.repository, self._keyring.current
        self._append(_HEAD.pack(_MAGIC, repository, self.pack, key, self._origin.epoch, len(group)) + group)

    def _append(self, data: Buffer) -> tuple[int, int]:
        assert self._upload is not None
        offset, length = self.size, len(data)
        if offset + length > MAX_PACK_BYTES:
            raise ValueError(f"a pack would grow past {MAX_PACK_BYTES} bytes")
        self._hash.update(data)
        self._upload.write(data)
        self.size += length
        return offset, length


def map_context(repository: bytes, disk: str, segment: int) -> bytes:
    return b"map " + repository + segment.to_bytes(8, "big") + disk.encode()


def footer_context(repository: bytes, pack: bytes) -> bytes:
    return b"footer " + repository + pack


def map_digest(keyring: Keyring, plain: Buffer) -> bytes:
    return keyring.digest(plain)[:MAP_DIGEST_BYTES]


def read_head(store: ObjectStore, pack: bytes, size: int) -> PackHead:
    """Whose pack it is, by its first bytes; `size` is the object's. DamageError if it is no pack."""
    if size < _HEAD.size:
        raise DamageError("the head", pack_key(pack), 0, size)
    return parse_head(store.get_range(pack_key(pack), 0, min(HEAD_BYTES, size)), pack)


def parse_head(data: Buffer, pack: bytes) -> PackHead:
    key = pack_key(pack)
    if len(data) < _HEAD.size:
        raise DamageError("the head", key, 0, len(data))
    magic, _, found, key_id, epoch, length = _HEAD.unpack_from(data, 0)
    group = bytes(data[_HEAD.size : _HEAD.size + length])
    if magic != _MAGIC or found != pack or len(group) != length:
        raise DamageError("the head", key, 0, _HEAD.size)
    return PackHead(found, key_id, Origin(group.decode(errors="replace"), epoch))


def read_tail(store: ObjectStore, pack: bytes, size: int) -> PackRef:
    """Where the footer is, by the last bytes of an object of `size` bytes."""
    key = pack_key(pack)
    if size < _HEAD.size + _TAIL.size:
        raise DamageError("a pack too short to be whole", key)
    tail = store.get_range(key, size - _TAIL.size, _TAIL.size)
    return _parse_tail(tail, pack, size)[0]


def _parse_tail(tail: Buffer, pack: bytes, size: int) -> tuple[PackRef, bytes]:
    offset, length, digest, magic = _TAIL.unpack(tail)
    if magic != _END or offset + length != size - _TAIL.size:
        raise DamageError("the tail", pack_key(pack), size - _TAIL.size, _TAIL.size)
    return PackRef(pack, offset, length), digest


def check_whole(data: bytes, pack: bytes) -> PackRef:
    """That a pack, read whole, is what was written; needs no key. DamageError otherwise."""
    parse_head(data, pack)
    if len(data) < _HEAD.size + _TAIL.size:
        raise DamageError("a pack too short to be whole", pack_key(pack))
    ref, digest = _parse_tail(memoryview(data)[-_TAIL.size :], pack, len(data))
    if blake3.blake3(memoryview(data)[: -_TAIL.size]).digest() != digest:
        raise DamageError("a byte", pack_key(pack), 0, len(data) - _TAIL.size)
    return ref


def read_contents(store: ObjectStore, keyring: Keyring, ref: PackRef) -> Contents:
    """What the footer of a pack says. DamageError names the pack."""
    key = pack_key(ref.pack)
    stored = read_range(store, key, ref.footer_offset, ref.footer_length)
    try:
        context = footer_context(keyring.repository, ref.pack)
        plain = keyring.open(ref.pack, ref.footer_offset, stored, context)
        return _decode_footer(expanded(plain, MAX_FOOTER_BYTES), ref.pack)
    except (ValueError, struct.error) as error:
        raise DamageError("the footer", key, ref.footer_offset, ref.footer_length) from error


def _encode_footer(runs: Sequence[Run], maps: Sequence[StoredMap]) -> bytes:
    """disks u16, packs u32, runs u32, maps u32 | length u8 and name of each disk | id of each pack
    | offset u32, length u32, digest 32 of each run
    | disk u16, segment u64, offset u32, length u32, number of packs u16, digest 16 of each map
    | u32 for each pack of each map: its number in the list above
    """
    disks = {name: n for n, name in enumerate(dict.fromkeys(m.disk for m in maps))}
    packs = {pack: n for n, pack in enumerate(dict.fromkeys(p for m in maps for p in m.ref.packs))}
    parts = [_FOOTER.pack(len(disks), len(packs), len(runs), len(maps))]
    parts += [bytes([len(name.encode())]) + name.encode() for name in disks]
    parts += packs
    parts += [_RUN.pack(r.offset, r.length, r.digest) for r in runs]
    for m in maps:
        ref = m.ref
        parts.append(_MAP.pack(disks[m.disk], ref.segment, ref.offset, ref.length, len(ref.packs), ref.digest))
    numbers = [packs[pack] for m in maps for pack in m.ref.packs]
    parts.append(struct.pack(f"<{len(numbers)}I", *numbers))
    # With a checksum: in a plain repository nothing else tells of a rotten footer, and no reader would notice that it
    # put one map in the place of another.
    return zstandard.ZstdCompressor(3, write_checksum=True).compress(b"".join(parts))


@dataclass(slots=True)
class _Reader:
    """Takes fixed pieces off the front; ValueError at the end."""

    data: memoryview
    at: int = field(default=0)

    def take(self, length: int) -> memoryview:
        piece = self.data[self.at : self.at + length]
        if len(piece) != length:
            raise ValueError("it ends too early")
        self.at += length
        return piece


def _decode_footer(data: bytes, pack: bytes) -> Contents:
    reader = _Reader(memoryview(data))
    disks, packs, runs, maps = _FOOTER.unpack(reader.take(_FOOTER.size))
    names = [bytes(reader.take(reader.take(1)[0])).decode() for _ in range(disks)]
    ids = [bytes(reader.take(ID_BYTES)) for _ in range(packs)]
    stored_runs = tuple(StoredRun(*fields) for fields in _RUN.iter_unpack(reader.take(runs * _RUN.size)))
    entries = list(_MAP.iter_unpack(reader.take(maps * _MAP.size)))
    total = sum(entry[4] for entry in entries)
    numbers = iter(struct.unpack(f"<{total}I", reader.take(4 * total)))
    if reader.at != len(data):
        raise ValueError("it goes on after its end")
    return Contents(stored_runs, tuple(_map_entries(entries, names, ids, numbers, pack)))


def _map_entries(
    entries: Sequence[tuple[int, int, int, int, int, bytes]],
    names: Sequence[str],
    ids: Sequence[bytes],
    numbers: Iterable[int],
    pack: bytes,
) -> Iterable[StoredMap]:
    numbers = iter(numbers)
    for disk, segment, offset, length, count, digest in entries:
        if disk >= len(names):
            raise ValueError("a map of a disk that is not named")
        chosen = [next(numbers) for _ in range(count)]
        if any(n >= len(ids) for n in chosen):
            raise ValueError("a map in a pack that is not named")
        ref = MapRef(segment, pack, offset, length, digest, tuple(ids[n] for n in chosen))
        yield StoredMap(names[disk], ref if length else segment_map.zero_ref(segment))
