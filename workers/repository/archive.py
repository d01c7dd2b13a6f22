"""Writes one disk at one epoch: blocks that changed into packs, with a new map for each segment that holds one.

    base    what blocks keep that a unit does not cover: the parent, or zeroes for a full copy
    known   where equal blocks may be taken from instead of storing them again: the parent whatever the base,
            then the index of blocks (see index.py)

A block is read whole if any byte of it may have changed. Packs are immutable and have random names, so a unit that is
written twice, or by a mover that should be dead, only leaves an orphan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from workers.failpoint import pass_point
from workers.repository import segment_map
from workers.repository.index import NoIndex, RunIndex
from workers.repository.layout import BLOCKS_A_SEGMENT, SEGMENTS_A_PAGE, DamageError
from workers.repository.pack import Origin, PackRef, PackWriter
from workers.repository.reader import PointDisk
from workers.repository.repository import Repository
from workers.repository.runs import Run, Squeezed, Squeezer
from workers.repository.segment_map import SegmentMap

READ_BLOCKS = 16
"""Blocks in one read of the source: 1 MiB."""
DEPTH = 8
"""Reads on their way; their buffers and what was made of them are held in memory."""
_ZEROES = bytes(BLOCK_BYTES)


class Readable(Protocol):
    def read_into(self, offset: int, buffer: memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a unit; `pack` is None if nothing of it had changed. `bytes_sent` counts stored blocks as they
    were before compression."""

    pack: PackRef | None
    bytes_read: int
    bytes_sent: int
    bytes_changed: int
    """Of all blocks that are now another than in the base: zeroes, and what was stored already, among them."""


@dataclass(frozen=True, slots=True)
class _Read:
    """Consecutive blocks to read at once; of one block only `parts` where given: data, and what reads as zeroes."""

    first: int
    count: int
    parts: tuple[Extent, ...] | None = None


Made = list[tuple[int, Squeezed | Run | None]]
"""Blocks by their number in the segment: to be stored, stored already, or zeroes."""


class Stopped(Exception):
    """The unit was given up because `go_on` said so; nothing of it is visible."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One disk of an open epoch. `exact` reads no byte beside the extents, as sync=top asks for."""

    repository: Repository
    origin: Origin
    disk: str
    size: int
    base: PointDisk | None = None
    known: PointDisk | None = None
    exact: bool = False
    shunned: frozenset[bytes] = frozenset()
    """Packs that were found damaged: what is in them is stored anew where it is read again."""
    index: RunIndex = field(default_factory=NoIndex)

    def write_unit(
        self,
        source: Readable,
        extents: Sequence[Extent],
        pool: Executor,
        go_on: Callable[[int], bool] = lambda length: True,
    ) -> Written:
        """Store what `extents` (sorted, of whole segments that no other unit of the epoch touches) now hold.

        `go_on` is asked before each read of so many bytes and may wait; False raises Stopped. Errors of the source are
        passed on, and so are StoreError and DamageError of the repository; the pack is then not there.
        """
        read = sent = changed = 0
        maps: list[tuple[int, bytes, tuple[bytes, ...]]] = []
        with PackWriter(self.repository.store, self.repository.keyring, self.origin) as pack:
            for segment, made in self._made(source, extents, pool, go_on):
                for index, block in made:
                    read += segment.length_of(index)
                    if isinstance(block, Squeezed):
                        sent += segment.length_of(index)
                        block = pack.add_run(block)
                    segment.runs[index] = block
                segment.awaited -= len(made)
                if segment.awaited == 0 and segment.is_changed:
                    changed += segment.bytes_changed()
                    encoded = segment_map.encode(segment.runs) if any(segment.runs) else b""
                    maps.append((segment.number, encoded, segment_map.packs_of(segment.runs)))
            for number, encoded, packs in sorted(maps):  # side by side, so that readers fetch them together
                pack.add_map(self.disk, number, encoded, packs)
            pass_point("before-pack")
            ref = pack.close()
        self.index.learn(pack.runs)
        return Written(ref, read, sent, changed)

    def _made(
        self, source: Readable, extents: Sequence[Extent], pool: Executor, go_on: Callable[[int], bool]
    ) -> Iterator[tuple[_Segment, Made]]:
        """What blocks are to become, in order, with up to DEPTH reads on their way.

        A buffer is used again only after the consumer has taken what views it.
        """
        squeezer = Squeezer(self.repository.record.compression_level)
        buffers = deque(bytearray(READ_BLOCKS * BLOCK_BYTES) for _ in range(DEPTH))
        flying: deque[tuple[_Segment, bytearray, Future[Made]]] = deque()

        def landed() -> Iterator[tuple[_Segment, Made]]:
            segment, buffer, future = flying[0]
            made = future.result()
            flying.popleft()
            yield segment, made
            buffers.append(buffer)

        try:
            for segment in self._segments(extents):
                if not segment.reads:
                    yield segment, []
                for read in segment.reads:
                    if not buffers:
                        yield from landed()
                    if not go_on(read.count * BLOCK_BYTES):
                        raise Stopped
                    buffer = buffers.popleft()
                    flying.append((segment, buffer, pool.submit(self._make, source, segment, read, buffer, squeezer)))
            while flying:
                yield from landed()
        finally:
            for _, _, future in flying:
                future.cancel()
            for _, _, future in flying:
                if not future.cancelled():
                    future.exception()  # nobody reads into a buffer of ours when this returns

    def _segments(self, extents: Sequence[Extent]) -> Iterator[_Segment]:
        for number, pieces in _by_segment(extents, self.base):
            yield _Segment(number, self, pieces)

    def _make(self, source: Readable, segment: _Segment, read: _Read, buffer: bytearray, squeezer: Squeezer) -> Made:
        """Read blocks and decide what each becomes: zeroes, a run that is stored already, or one to store."""
        start = (segment.number * BLOCKS_A_SEGMENT + read.first) * BLOCK_BYTES
        length = min(read.count * BLOCK_BYTES, self.size - start)
        view = memoryview(buffer)[:length]
        if read.parts is not None:
            self._read_parts(source, start, view, read.parts)
        else:
            source.read_into(start, view)
        made: Made = []
        digests: dict[int, bytes] = {}
        for at in range(0, length, BLOCK_BYTES):
            index = read.first + at // BLOCK_BYTES
            block = view[at : at + BLOCK_BYTES]
            if block[0] == 0 and _ZEROES.startswith(block):
                made.append((index, None))
                continue
            digest = self.repository.keyring.digest(block)
            old = segment.known[index] if index < len(segment.known) else None
            if old is not None and old.digest == digest:
                made.append((index, old))
            else:
                digests[index] = digest
        stored = self.index.find(digests.values())
        for index, digest in digests.items():
            at = (index - read.first) * BLOCK_BYTES
            found = stored.get(digest)
            made.append((index, found or squeezer.squeeze(view[at : at + BLOCK_BYTES], digest)))
        return sorted(made, key=lambda pair: pair[0])

    def _read_parts(self, source: Readable, start: int, view: memoryview, parts: Iterable[Extent]) -> None:
        """Only the covered ranges from the source, the rest from the base."""
        if self.base is None:
            view[:] = bytes(len(view))
        else:
            self.base.read_into(start, view)
        for part in parts:
            piece = view[part.offset - start : part.end - start]
            if part.reads_as_zeroes:
                piece[:] = bytes(len(piece))
            else:
                source.read_into(part.offset, piece)


class _Segment:
    """One segment of a unit: its runs before, its runs to be, and what is to be read for that."""

    def __init__(self, number: int, archive: Archive, pieces: Sequence[Extent]) -> None:
        self.number = number
        self._end = min(SEGMENT_BYTES, archive.size - number * SEGMENT_BYTES)
        blocks = -(-self._end // BLOCK_BYTES)
        base, self._is_damaged = _runs_of(archive.base, number)
        before = list(base or ())[:blocks]
        self.before: list[Run | None] = before + [None] * (blocks - len(before))
        self.runs = list(self.before)
        if self._is_damaged and sum(piece.length for piece in pieces) < self._end:  # all of it is written anew
            pieces = [Extent(number * SEGMENT_BYTES, self._end, Status.DATA)]
        known = base if archive.known is archive.base else _runs_of(archive.known, number)[0]
        self.known = [run if run is not None and run.pack not in archive.shunned else None for run in known or ()]
        self.reads = list(self._reads(blocks, archive, pieces))
        self.awaited = sum(read.count for read in self.reads)
        """Blocks that are still to be read."""

    @property
    def is_changed(self) -> bool:
        """Whether it needs a map: also if the one it has cannot be read."""
        return self._is_damaged or self.runs != self.before

    def bytes_changed(self) -> int:
        return sum(self.length_of(n) for n, run in enumerate(self.runs) if run != self.before[n])

    def length_of(self, index: int) -> int:
        """Of a block; the disk's last may be short."""
        return min(BLOCK_BYTES, self._end - index * BLOCK_BYTES)

    def _reads(self, blocks: int, archive: Archive, pieces: Sequence[Extent]) -> Iterator[_Read]:
        start = self.number * SEGMENT_BYTES
        whole_zeroes, touched = _coverage(start, blocks, archive.size, pieces)
        for index in whole_zeroes:
            self.runs[index] = None
        run: list[int] = []
        for index in sorted(touched - whole_zeroes):
            parts = _parts(start + index * BLOCK_BYTES, archive.size, pieces) if archive.exact else None
            if parts is not None:
                yield _Read(index, 1, parts)
                continue
            if run and (run[-1] + 1 != index or len(run) == READ_BLOCKS):
                yield _Read(run[0], len(run))
                run = []
            run.append(index)
        if run:
            yield _Read(run[0], len(run))


def _runs_of(disk: PointDisk | None, segment: int) -> tuple[SegmentMap | None, bool]:
    """Its runs, and whether the map that should name them is damaged, or the page that should name the map."""
    if disk is None:
        return None, False
    try:
        return disk.runs(segment), False
    except DamageError:
        return None, True


def _coverage(start: int, blocks: int, size: int, pieces: Sequence[Extent]) -> tuple[set[int], set[int]]:
    """(blocks that read as zeroes from end to end, all blocks that are covered at all), by number in the segment."""
    touched: set[int] = set()
    zeroed = [0] * blocks
    for piece in pieces:
        first, last = (piece.offset - start) // BLOCK_BYTES, (piece.end - 1 - start) // BLOCK_BYTES
        touched.update(range(first, last + 1))
        if not piece.reads_as_zeroes:
            continue
        for index in range(first, last + 1):
            block = start + index * BLOCK_BYTES
            zeroed[index] += min(piece.end, block + BLOCK_BYTES) - max(piece.offset, block)
    lengths = (min(BLOCK_BYTES, size - start - index * BLOCK_BYTES) for index in range(blocks))
    return {index for index, length in enumerate(lengths) if zeroed[index] == length}, touched


def _parts(block: int, size: int, pieces: Sequence[Extent]) -> tuple[Extent, ...] | None:
    """What of the block at `block` is covered, and how; None if data covers all of it."""
    end = min(block + BLOCK_BYTES, size)
    covered = tuple(
        Extent(max(p.offset, block), min(p.end, end) - max(p.offset, block), p.status)
        for p in pieces
        if p.offset < end and p.end > block
    )
    data = sum(part.length for part in covered if not part.reads_as_zeroes)
    return None if data == end - block else covered


def _by_segment(extents: Sequence[Extent], base: PointDisk | None) -> Iterator[tuple[int, list[Extent]]]:
    """Extents cut at segments. Of a long hole only those segments in which there is something to be zeroed."""
    pieces: list[Extent] = []
    current = -1
    for extent in extents:
        for segment in _touched(extent, base):
            if segment != current and pieces:
                yield current, pieces
                pieces = []
            current = segment
            start, end = segment * SEGMENT_BYTES, (segment + 1) * SEGMENT_BYTES
            offset = max(start, extent.offset)
            pieces.append(Extent(offset, min(end, extent.end) - offset, extent.status))
    if pieces:
        yield current, pieces


def _touched(extent: Extent, base: PointDisk | None) -> Iterator[int]:
    first, end = extent.offset // SEGMENT_BYTES, -(-extent.end // SEGMENT_BYTES)
    if not extent.reads_as_zeroes:
        yield from range(first, end)
        return
    inner_first, inner_end = -(-extent.offset // SEGMENT_BYTES), extent.end // SEGMENT_BYTES
    if inner_first >= inner_end:
        yield from range(first, end)
        return
    yield from range(first, inner_first)
    if base is not None:
        yield from _mapped(base, inner_first, inner_end)
    yield from range(inner_end, end)


def _mapped(base: PointDisk, first: int, end: int) -> Iterator[int]:
    """Segments in which there is something, or may be: all those whose page is damaged."""
    while first < end:
        stop = min(end, (first // SEGMENTS_A_PAGE + 1) * SEGMENTS_A_PAGE)
        try:
            found: Iterable[int] = list(base.mapped(first, stop))
        except DamageError:
            found = range(first, stop)
        yield from found
        first = stop
