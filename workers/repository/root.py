"""A root: one disk at one epoch. Segment -> its newest map, in pages; pages untouched by an epoch are inherited.

    head       magic "FPROOT\\0\\1" | repository 16 | key 16 | length of name u16 | the object's own name
    pages      those that this epoch wrote, each compressed and sealed
    directory  compressed and sealed: disk size u64, roots u32, pages u32 | length u16 and name of each older root
               | for each page: root u32 (0: this object, n: the n-th older one, 0xFFFFFFFF: all of it reads as
               zeroes), offset u64, length u32, digest 16
    tail       offset of directory u64 | its length u32 | BLAKE3 of all before the tail, 32 | magic "FPREND\\0\\1"

    a page     packs u32, segments u16, references u32 | pack ids | for each segment that is not zero: number in the
               page u16, pack u32, offset u32, length u32, digest 16, number of packs u16 | pack u32 of each reference

A page covers SEGMENTS_A_PAGE segments, so an epoch that touches few of a huge disk writes kilobytes. The digest of a
directory, which names the digests of all pages, is in the manifest: the manifest vouches for every byte of the disk.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import blake3
import zstandard

from coordinator.model.extent import SEGMENT_BYTES
from workers.repository.expand import expanded
from workers.repository.keyring import Keyring
from workers.repository.layout import DIGEST_BYTES, ID_BYTES, SEGMENTS_A_PAGE, DamageError, read_range
from workers.repository.segment_map import MAP_DIGEST_BYTES, MAX_MAP_BYTES, MapRef
from workers.repository.store.contract import Buffer, MissingObjectError, ObjectStore

_MAGIC = b"FPROOT\0\1"
_END = b"FPREND\0\1"
_HEAD = struct.Struct(f"<8s{ID_BYTES}s{ID_BYTES}sH")
_TAIL = struct.Struct(f"<QI{DIGEST_BYTES}s8s")
_DIRECTORY = struct.Struct("<QII")
PAGE_DIGEST_BYTES = 16
_PAGE_ENTRY = struct.Struct(f"<IQI{PAGE_DIGEST_BYTES}s")
_PAGE = struct.Struct("<IHI")
_SEGMENT = struct.Struct(f"<HIII{MAP_DIGEST_BYTES}sH")
_EMPTY = 0xFFFFFFFF
MAX_DIRECTORY_BYTES = 1 << 30
MAX_PAGE_BYTES = 1 << 28
"""Bounds of what is decompressed, whatever an object says."""


@dataclass(frozen=True, slots=True)
class RootRef:
    """A root as the manifest names it: where its directory is, and the digest that vouches for all of it."""

    key: str
    directory_offset: int
    directory_length: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.key} {self.directory_offset} {self.directory_length} {self.digest.hex()}"

    @classmethod
    def parse(cls, text: str) -> Self:
        key, offset, length, digest = text.split(" ")
        return cls(key, int(offset), int(length), bytes.fromhex(digest))


@dataclass(frozen=True, slots=True)
class PageRef:
    """`root` is the key of the object that holds the page, "" if all of it reads as zeroes."""

    root: str
    offset: int
    length: int
    digest: bytes


_NO_PAGE = PageRef("", 0, 0, bytes(PAGE_DIGEST_BYTES))
Page = dict[int, MapRef]
"""Segment number -> its map; segments that read as zeroes are not in it."""


def segments_of(size: int) -> int:
    """How many segments a disk of `size` bytes has."""
    return -(-size // SEGMENT_BYTES)


def pages_of(size: int) -> int:
    return -(-segments_of(size) // SEGMENTS_A_PAGE)


class Root:
    """A root that can be read; holds its directory, not its pages."""

    def __init__(
        self, ref: RootRef | None, size: int, pages: list[PageRef], store: ObjectStore, keyring: Keyring
    ) -> None:
        self.ref = ref
        self.size = size
        self.pages = pages
        self._store = store
        self._keyring = keyring

    @classmethod
    def empty(cls, size: int, store: ObjectStore, keyring: Keyring) -> Root:
        """A disk that reads as zeroes, of which there is no object."""
        return cls(None, size, [_NO_PAGE] * pages_of(size), store, keyring)

    @classmethod
    def load(cls, ref: RootRef, store: ObjectStore, keyring: Keyring) -> Root:
        """DamageError if the directory is not what the manifest names."""
        root = cls(ref, 0, [], store, keyring)
        stored = read_range(store, ref.key, ref.directory_offset, ref.directory_length)
        try:
            context = _context(keyring, "directory", ref.key)
            plain = keyring.open(ref.key.encode(), ref.directory_offset, stored, context)
            if keyring.digest(plain) != ref.digest:
                raise ValueError("another digest")
            root.size, root.pages = _decode_directory(expanded(plain, MAX_DIRECTORY_BYTES), ref.key)
        except (ValueError, struct.error) as error:
            raise DamageError("the directory", ref.key, ref.directory_offset, ref.directory_length) from error
        return root

    def page(self, number: int) -> Page:
        """The maps of one page. DamageError names the object that holds it."""
        ref = self.pages[number]
        if not ref.root:
            return {}
        try:
            stored = read_range(self._store, ref.root, ref.offset, ref.length)
        except MissingObjectError as error:
            raise DamageError("a root that is missing, wanted", ref.root, ref.offset, ref.length) from error
        try:
            context = _context(self._keyring, f"page {number}", ref.root)
            plain = self._keyring.open(ref.root.encode(), ref.offset, stored, context)
            if self._keyring.digest(plain)[:PAGE_DIGEST_BYTES] != ref.digest:
                raise ValueError("another digest")
            return _decode_page(expanded(plain, MAX_PAGE_BYTES), number)
        except (ValueError, IndexError, struct.error) as error:
            raise DamageError("a page", ref.root, ref.offset, ref.length) from error

    def maps(self) -> Iterator[MapRef]:
        """All maps of segments that do not read as zeroes, a page at a time."""
        for number in range(len(self.pages)):
            page = self.page(number)
            yield from (page[segment] for segment in sorted(page))

    def roots(self) -> set[str]:
        """The objects that hold its pages, and its own."""
        held = {page.root for page in self.pages if page.root}
        return held | ({self.ref.key} if self.ref else set())


def write_root(
    store: ObjectStore, keyring: Keyring, key: str, base: Root, size: int, changed: Iterable[MapRef]
) -> RootRef:
    """Write the root `key`: `base` (of the parent, or empty) with the `changed` maps, sorted by segment, over it.

    Bounded memory: a page at a time, beside the directory. The object is visible only when all of it is there.
    DamageError for a page of `base` that cannot be read, unless all of its segments are among the changed ones.
    """
    name = key.encode()
    seal = keyring.seal(name)
    pages = (base.pages + [_NO_PAGE] * pages_of(size))[: pages_of(size)]
    hashed = blake3.blake3()
    with store.upload(key) as upload:

        def write(data: Buffer) -> None:
            hashed.update(data)
            upload.write(data)

        head = _HEAD.pack(_MAGIC, keyring.repository, keyring.current, len(name)) + name
        write(head)
        at = len(head)
        for number, refs in itertools.groupby(changed, key=lambda ref: ref.segment // SEGMENTS_A_PAGE):
            page = _overlaid(base, number, list(refs), size)
            if not page:
                pages[number] = _NO_PAGE
                continue
            plain = zstandard.ZstdCompressor(3).compress(_encode_page(page, number))
            sealed = seal.seal(at, plain, _context(keyring, f"page {number}", key))
            pages[number] = PageRef(key, at, len(sealed), keyring.digest(plain)[:PAGE_DIGEST_BYTES])
            write(sealed)
            at += len(sealed)
        plain = zstandard.ZstdCompressor(3).compress(_encode_directory(size, pages, key))
        sealed = seal.seal(at, plain, _context(keyring, "directory", key))
        write(sealed)
        upload.write(_TAIL.pack(at, len(sealed), hashed.digest(), _END))
        upload.commit()
    return RootRef(key, at, len(sealed), keyring.digest(plain))


def check_whole(data: bytes, key: str) -> None:
    """That a root object, read whole, is what was written; needs no key. DamageError otherwise."""
    if len(data) < _HEAD.size + _TAIL.size:
        raise DamageError("a root too short to be whole", key)
    offset, length, digest, magic = _TAIL.unpack_from(data, len(data) - _TAIL.size)
    if magic != _END or offset + length != len(data) - _TAIL.size:
        raise DamageError("the tail", key, len(data) - _TAIL.size, _TAIL.size)
    if not data.startswith(_MAGIC) or blake3.blake3(memoryview(data)[: -_TAIL.size]).digest() != digest:
        raise DamageError("a byte", key, 0, len(data) - _TAIL.size)


def _overlaid(base: Root, number: int, refs: Sequence[MapRef], size: int) -> Page:
    """A page of `base` with `refs` over it. One that is damaged is only passed over if nothing of it would be left."""
    try:
        page = base.page(number) if number < len(base.pages) else {}
    except DamageError:
        in_page = min(SEGMENTS_A_PAGE, segments_of(size) - number * SEGMENTS_A_PAGE)
        if len({ref.segment for ref in refs}) < in_page:
            raise
        page = {}
    for ref in refs:
        if ref.is_zero:
            page.pop(ref.segment, None)
        else:
            page[ref.segment] = ref
    return page


def _context(keyring: Keyring, what: str, key: str) -> bytes:
    return keyring.repository + f"{what} of {key}".encode()


def _encode_directory(size: int, pages: list[PageRef], own: str) -> bytes:
    older = {root: n for n, root in enumerate(dict.fromkeys(p.root for p in pages if p.root not in ("", own)), 1)}
    numbers = {**older, own: 0, "": _EMPTY}
    parts = [_DIRECTORY.pack(size, len(older), len(pages))]
    parts += [len(root.encode()).to_bytes(2, "little") + root.encode() for root in older]
    parts += [_PAGE_ENTRY.pack(numbers[p.root], p.offset, p.length, p.digest) for p in pages]
    return b"".join(parts)


def _decode_directory(data: bytes, own: str) -> tuple[int, list[PageRef]]:
    size, roots, pages = _DIRECTORY.unpack_from(data, 0)
    at = _DIRECTORY.size
    if at + 2 * roots + pages * _PAGE_ENTRY.size > len(data):
        raise ValueError("a directory shorter than what it counts")
    names = {0: own, _EMPTY: ""}
    for number in range(1, roots + 1):
        length = int.from_bytes(data[at : at + 2], "little")
        names[number] = data[at + 2 : at + 2 + length].decode()
        at += 2 + length
    if len(data) != at + pages * _PAGE_ENTRY.size or pages != pages_of(size):
        raise ValueError("a directory of another length than its pages need")
    found = []
    for root, offset, length, digest in _PAGE_ENTRY.iter_unpack(memoryview(data)[at:]):
        if root not in names:
            raise ValueError("a page in a root that is not named")
        found.append(PageRef(names[root], offset, length, digest))
    return size, found


def _encode_page(page: Page, number: int) -> bytes:
    first = number * SEGMENTS_A_PAGE
    refs = [page[segment] for segment in sorted(page)]
    packs = {p: n for n, p in enumerate(dict.fromkeys(p for r in refs for p in (r.pack, *r.packs)))}
    references = [packs[pack] for ref in refs for pack in ref.packs]
    parts = [_PAGE.pack(len(packs), len(refs), len(references)), *packs]
    for r in refs:
        parts.append(_SEGMENT.pack(r.segment - first, packs[r.pack], r.offset, r.length, r.digest, len(r.packs)))
    parts.append(struct.pack(f"<{len(references)}I", *references))
    return b"".join(parts)


def _decode_page(data: bytes, number: int) -> Page:
    view = memoryview(data)
    packs, segments, references = _PAGE.unpack_from(view, 0)
    at = _PAGE.size + packs * ID_BYTES
    end = at + segments * _SEGMENT.size
    if len(view) != end + 4 * references:
        raise ValueError("a page of another length than its segments need")
    ids = [bytes(view[o : o + ID_BYTES]) for o in range(_PAGE.size, at, ID_BYTES)]
    numbers = iter(struct.unpack_from(f"<{references}I", view, end))
    page: Page = {}
    for in_page, pack, offset, length, digest, count in _SEGMENT.iter_unpack(view[at:end]):
        if in_page >= SEGMENTS_A_PAGE or not 0 < length <= MAX_MAP_BYTES:
            raise ValueError("a segment that cannot be in this page")
        segment = number * SEGMENTS_A_PAGE + in_page
        chosen = tuple(ids[n] for n in itertools.islice(numbers, count))
        page[segment] = MapRef(segment, ids[pack], offset, length, digest, chosen)
    return page
