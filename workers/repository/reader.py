"""Reads disks of recovery points: maps and runs by as few ranged requests as may be, each run checked.

Runs of one segment that lie side by side in a pack are fetched together, and so are the maps of one page of the root:
whoever reads a disk from its start to its end makes about one request for SPAN_BYTES, and for maps a few for each pack
that a page refers to, whatever lies between their segments. Spans are kept for a moment, since many threads read one
segment; two that want the same span wait for one request. Whoever wants much of a disk at once takes `stream`: fewer,
longer requests, whose bytes are passed on while they are still in the processor's cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Generic, TypeVar

from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from workers.repository import segment_map
from workers.repository.keyring import Keyring
from workers.repository.layout import BLOCKS_A_SEGMENT, SEGMENTS_A_PAGE, DamageError, pack_key, read_range, stream_range
from workers.repository.pack import map_context, map_digest
from workers.repository.prefetch import Prefetcher
from workers.repository.relocations import MAX_HOPS, Relocations
from workers.repository.root import Page, Root
from workers.repository.runs import Run, open_run
from workers.repository.segment_map import MapRef, SegmentMap
from workers.repository.store.contract import Buffer, MissingObjectError, ObjectStore, ReadNext

SPAN_BYTES = 8 * 1024 * 1024
"""What is fetched at once. With SPANS of them held, 48 MiB a reader."""
SPANS = 6
MAP_SPAN_BYTES = 256 * 1024
MAP_PAGES = 4
"""Of so many pages of the root fetched maps are held, at most 3 MB each. After many epochs neighbours have theirs in
different packs, so that whoever reads in order comes back to each span again and again."""
MAPS = 128
PAGES = 16
PAGE_BYTES = SEGMENTS_A_PAGE * SEGMENT_BYTES
STREAM_BYTES = 64 * 1024 * 1024
"""The longest streamed request. SeaweedFS spends half as much again on the same bytes in requests of 8 MiB."""
STREAM_BLOCKS = 16
"""A span of fewer blocks is not worth a stream."""
PIECE_BYTES = 256 * 1024
PIECE_BLOCKS = 16
"""What is read of a stream at once, and the most blocks that are made of it."""
GAP_BYTES = BLOCK_BYTES
"""A gap up to this is read over: cheaper than another request."""

Write = Callable[[int, memoryview], None]
"""What takes bytes of a disk from an offset on; the bytes are its own only until it returns."""
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Once(Generic[Key, Value]):
    """A cache of the `limit` values used last; each is made once, however many threads want it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._made: OrderedDict[Key, Future[Value]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        with self._lock:
            future = self._made.get(key)
            mine = future is None
            if future is None:
                future = self._made[key] = Future()
                while len(self._made) > self._limit:
                    self._made.popitem(last=False)
            else:
                self._made.move_to_end(key)
        if not mine:
            return future.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                self._made.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(value)
        return value


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of one pack that are fetched together."""

    pack: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Located:
    """The map of a segment, and for each of its blocks the span its run is fetched with."""

    runs: SegmentMap
    spans: dict[int, _Span]


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A page of the root, for each of its segments the span its map is fetched with, and whose maps a span holds."""

    maps: Page
    spans: dict[int, _Span]
    members: dict[_Span, list[MapRef]]
    fetched: _Once[_Span, dict[int, bytes] | None] = field(default_factory=lambda: _Once(SEGMENTS_A_PAGE))
    """The stored maps of a span, by segment; None if the pack is gone."""


class Fetcher:
    """Stored bytes and maps of a repository. Thread-safe."""

    def __init__(self, store: ObjectStore, keyring: Keyring, relocations: Relocations, prefetcher: Prefetcher) -> None:
        self.prefetcher = prefetcher
        self._store = store
        self._keyring = keyring
        self._relocations = relocations

    def bytes_of(self, pack: bytes, offset: int, length: int) -> bytes:
        """MissingObjectError if the pack is gone; DamageError if it ends before."""
        return read_range(self._store, pack_key(pack), offset, length)

    def stream(self, span: _Span, consume: Callable[[ReadNext], None]) -> None:
        """As `ObjectStore.stream_range`; DamageError if the pack ends before."""
        stream_range(self._store, pack_key(span.pack), span.start, span.end - span.start, consume)

    def block(self, stored: Buffer, run: Run, length: int) -> Buffer:
        return open_run(stored, run, length, self._keyring)

    def moved_block(self, run: Run, length: int) -> Buffer:
        """A block whose pack is gone, from where compaction took it."""
        for _ in range(MAX_HOPS):
            run = self._relocations.run(run)
            try:
                stored = self.bytes_of(run.pack, run.offset, run.length)
            except MissingObjectError:
                continue
            return self.block(stored, run, length)
        raise DamageError("a run that was moved again and again", pack_key(run.pack), run.offset, run.length)

    def map(self, disk: str, ref: MapRef, stored: Buffer | None = None) -> SegmentMap:
        """The map that `ref` names; `stored` if its bytes were fetched already."""
        for _ in range(MAX_HOPS):
            try:
                if stored is None:
                    stored = self.bytes_of(ref.pack, ref.offset, ref.length)
            except MissingObjectError:
                ref = self._relocations.map(ref)
                continue
            return self._decoded(disk, ref, stored)
        raise DamageError("a map that was moved again and again", pack_key(ref.pack), ref.offset, ref.length)

    def _decoded(self, disk: str, ref: MapRef, stored: Buffer) -> SegmentMap:
        context = map_context(self._keyring.repository, disk, ref.segment)
        try:
            plain = self._keyring.open(ref.pack, ref.offset, stored, context)
            if map_digest(self._keyring, plain) != ref.digest:
                raise ValueError("another digest")
            return segment_map.decode(plain)
        except ValueError as error:
            raise DamageError("a map", pack_key(ref.pack), ref.offset, ref.length) from error


class PointDisk:
    """One disk as it was at one point. Thread-safe; bounded memory whatever its size."""

    def __init__(self, name: str, root: Root, fetcher: Fetcher, span_bytes: int = SPAN_BYTES) -> None:
        """`span_bytes` bounds what one read fetches at once, and so how far it reads ahead."""
        self.name = name
        self.size = root.size
        self._root = root
        self._fetcher = fetcher
        self._span_bytes = span_bytes
        self._pages: _Once[int, Page] = _Once(PAGES)
        self._mapped: _Once[int, _Mapped] = _Once(MAP_PAGES)
        self._maps: _Once[int, _Located | None] = _Once(MAPS)
        self._spans: _Once[_Span, bytes | None] = _Once(SPANS)

    def runs(self, segment: int) -> SegmentMap | None:
        """The runs of a segment; None if all of it reads as zeroes."""
        located = self._located(segment)
        return located.runs if located is not None else None

    def mapped(self, first: int, end: int) -> Iterator[int]:
        """Segments in [first, end) that do not read as zeroes, in order."""
        end = min(end, len(self._root.pages) * SEGMENTS_A_PAGE)
        for number in range(first // SEGMENTS_A_PAGE, -(-end // SEGMENTS_A_PAGE)):
            yield from sorted(segment for segment in self._page(number) if first <= segment < end)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data and holes, sorted, joined within a segment. What has no map costs nothing; maps are fetched ahead."""
        end = min(offset + length, self.size)
        segments = self.mapped(offset // SEGMENT_BYTES, -(-end // SEGMENT_BYTES))
        for segment, locating in self._fetcher.prefetcher.each(self._located, segments):
            start = max(offset, segment * SEGMENT_BYTES)
            if offset < start:
                yield Extent(offset, start - offset, Status.HOLE)
            offset = min(end, (segment + 1) * SEGMENT_BYTES)
            yield from _extents_of(locating.result(), start, offset)
        if offset < end:
            yield Extent(offset, end - offset, Status.HOLE)

    def changes(self, since: PointDisk, offset: int, length: int) -> Iterator[Extent]:
        """Of the range what may differ from the disk as it was at another point; sorted, the rest is left out. Maps are
        fetched where their digests differ, so it costs what was changed and not what there is."""
        end = min(offset + length, self.size)
        for number in range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)):
            if self._root.pages[number : number + 1] == since._root.pages[number : number + 1]:
                continue
            ours, theirs = self._page_or_none(number), since._page_or_none(number)
            for segment in sorted(ours.keys() | theirs.keys()):
                start, stop = max(offset, segment * SEGMENT_BYTES), min(end, (segment + 1) * SEGMENT_BYTES)
                now, then = ours.get(segment), theirs.get(segment)
                if start >= stop or (now and then and now.digest == then.digest):
                    continue
                yield from self._changed_blocks(since, segment, start, stop)

    def _page_or_none(self, number: int) -> Page:
        return self._page(number) if number < len(self._root.pages) else {}

    def _changed_blocks(self, since: PointDisk, segment: int, start: int, stop: int) -> Iterator[Extent]:
        ours, theirs = self.runs(segment) or (), since.runs(segment) or ()
        first = segment * BLOCKS_A_SEGMENT
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            now, then = (runs[block - first] if block - first < len(runs) else None for runs in (ours, theirs))
            if (now.digest if now else None) != (then.digest if then else None):
                at, after = max(start, block * BLOCK_BYTES), min(stop, (block + 1) * BLOCK_BYTES)
                yield Extent(at, after - at, Status.DATA if now else Status.ZERO)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`. DamageError, StoreError; what the buffer then holds is undefined."""
        at, end = offset, offset + len(buffer)
        while at < end:
            segment = at // SEGMENT_BYTES
            stop = min(end, (segment + 1) * SEGMENT_BYTES)
            target = buffer[at - offset : stop - offset]
            located = self._located(segment)
            if located is None:
                _zero(target)
            else:
                self._read_segment(located, at, target)
            at = stop

    def stream(self, ranges: Iterable[tuple[int, int]], write: Write) -> list[tuple[int, int]]:
        """Hand out the whole blocks of `ranges` (offset, length in bytes) in the order in which they are stored, which
        `write` may be given twice. Returns what it leaves: where too little lies side by side, and parts of blocks.

        DamageError, StoreError, and the FlushpointErrors of `write`.
        """
        left: list[tuple[int, int]] = []
        runs: dict[int, Run] = {}
        for offset, length in ranges:
            for number in range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)):
                start = max(offset, number * BLOCK_BYTES)
                end = min(offset + length, (number + 1) * BLOCK_BYTES)
                run = self._run(number)
                if run is None or end - start != self._length_of(number):
                    left.append((start, end - start))
                else:
                    runs[number] = run
        spans: dict[_Span, list[int]] = {}
        places = ((run.pack, run.offset, run.length, number) for number, run in runs.items())
        for number, span in _spans_of(places, STREAM_BYTES).items():
            spans.setdefault(span, []).append(number)
        for span, numbers in spans.items():
            if len(numbers) < STREAM_BLOCKS:
                left += ((number * BLOCK_BYTES, self._length_of(number)) for number in numbers)
            else:
                found = [(number, runs[number]) for number in numbers]
                self._fetcher.stream(span, partial(self._pass_on, span, found, write))
        return left

    def _pass_on(self, span: _Span, runs: list[tuple[int, Run]], write: Write, read_next: ReadNext) -> None:
        """`runs` are in the order of the stream."""
        at = span.start
        for piece in _pieces(runs):
            start, end = piece[0][1].offset, max(run.offset + run.length for _, run in piece)
            if start > at:
                read_next(start - at)
            stored = memoryview(read_next(end - start))
            at = end
            for offset, data in self._stretches(piece, stored):
                write(offset, data)

    def _stretches(self, piece: list[tuple[int, Run]], stored: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Neighbouring blocks as one, up to PIECE_BLOCKS. Those that are stored as they are, one behind the other, are
        not copied. All of them are checked before the first is handed out; one that many share is opened once."""
        start = piece[0][1].offset
        opened: dict[int, Buffer] = {}
        for number, run in piece:
            if run.offset not in opened:
                there = stored[run.offset - start :][: run.length]
                opened[run.offset] = self._fetcher.block(there, run, self._length_of(number))
        made = [(number, run, opened[run.offset]) for number, run in sorted(piece, key=itemgetter(0))]
        for _, group in groupby(enumerate(made), key=lambda item: (item[1][0] - item[0], item[0] // PIECE_BLOCKS)):
            blocks = [item for _, item in group]
            first, last = blocks[0][1], blocks[-1][1]
            in_place = all(run.raw and isinstance(block, memoryview) for _, run, block in blocks)
            if in_place and all(b[1].offset == a[1].offset + a[1].length for a, b in pairwise(blocks)):
                data = stored[first.offset - start : last.offset + last.length - start]
            else:
                data = memoryview(b"".join(block for *_, block in blocks))
            yield blocks[0][0] * BLOCK_BYTES, data

    def _run(self, number: int) -> Run | None:
        located = self._located(number // BLOCKS_A_SEGMENT)
        index = number % BLOCKS_A_SEGMENT
        return located.runs[index] if located is not None and index < len(located.runs) else None

    def _length_of(self, number: int) -> int:
        return min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)

    def _read_segment(self, located: _Located, offset: int, target: memoryview) -> None:
        """`offset` and all of `target` lie in the segment."""
        at, end = offset, offset + len(target)
        while at < end:
            number = at // BLOCK_BYTES
            start = number * BLOCK_BYTES
            stop = min(end, start + BLOCK_BYTES)
            piece = target[at - offset : stop - offset]
            index = number % BLOCKS_A_SEGMENT
            run = located.runs[index] if index < len(located.runs) else None
            if run is None:
                _zero(piece)
            else:
                block = self._block(run, located.spans[index], min(BLOCK_BYTES, self.size - start))
                piece[:] = memoryview(block)[at - start : stop - start]
            at = stop

    def _block(self, run: Run, span: _Span, length: int) -> Buffer:
        fetched = self._spans.get(span, lambda: self._fetch(span))
        if fetched is None:
            return self._fetcher.moved_block(run, length)
        start = run.offset - span.start
        return self._fetcher.block(memoryview(fetched)[start : start + run.length], run, length)

    def _fetch(self, span: _Span) -> bytes | None:
        """None if the pack is gone."""
        try:
            return self._fetcher.bytes_of(span.pack, span.start, span.end - span.start)
        except MissingObjectError:
            return None

    def _page(self, number: int) -> Page:
        return self._pages.get(number, lambda: self._root.page(number))

    def _located(self, segment: int) -> _Located | None:
        return self._maps.get(segment, lambda: self._load(segment))

    def _load(self, segment: int) -> _Located | None:
        page = self._mapped.get(segment // SEGMENTS_A_PAGE, lambda: self._map_page(segment // SEGMENTS_A_PAGE))
        ref = page.maps.get(segment)
        if ref is None:
            return None
        span = page.spans[segment]
        fetched = page.fetched.get(span, lambda: self._fetch_maps(page, span))
        runs = self._fetcher.map(self.name, ref, None if fetched is None else fetched[segment])
        places = ((run.pack, run.offset, run.length, index) for index, run in enumerate(runs) if run is not None)
        return _Located(runs, _spans_of(places, self._span_bytes))

    def _map_page(self, number: int) -> _Mapped:
        page = self._page(number)
        places = ((ref.pack, ref.offset, ref.length, segment) for segment, ref in page.items())
        spans = _spans_of(places, MAP_SPAN_BYTES)
        members: dict[_Span, list[MapRef]] = {}
        for segment, span in spans.items():
            members.setdefault(span, []).append(page[segment])
        return _Mapped(page, spans, members)

    def _fetch_maps(self, page: _Mapped, span: _Span) -> dict[int, bytes] | None:
        """Only what the page names of the span: much of what lies between may have been replaced since."""
        fetched = self._fetch(span)
        if fetched is None:
            return None
        return {
            ref.segment: fetched[ref.offset - span.start : ref.offset - span.start + ref.length]
            for ref in page.members[span]
        }


def _extents_of(located: _Located | None, offset: int, stop: int) -> Iterator[Extent]:
    """Stretches of data and of holes; all of it lies in the segment."""
    runs = located.runs if located is not None else ()
    first = offset // BLOCK_BYTES
    segment = first - first % BLOCKS_A_SEGMENT
    for is_data, blocks in groupby(
        range(first, -(-stop // BLOCK_BYTES)),
        lambda number: number - segment < len(runs) and runs[number - segment] is not None,
    ):
        end = min(stop, (deque(blocks, maxlen=1).pop() + 1) * BLOCK_BYTES)
        yield Extent(offset, end - offset, Status.DATA if is_data else Status.HOLE)
        offset = end


def _spans_of(places: Iterable[tuple[bytes, int, int, int]], limit: int) -> dict[int, _Span]:
    """(pack, offset, length, name) of what is stored -> for each name the bytes to fetch it with: its neighbours in its
    pack, up to `limit` bytes in all."""
    spans: dict[int, _Span] = {}
    members: list[int] = []
    within, start, end = b"", 0, 0

    def close() -> None:
        spans.update(dict.fromkeys(members, _Span(within, start, end)))
        members.clear()

    for pack, offset, length, name in sorted(places):
        if pack != within or offset - end > GAP_BYTES or offset + length - start > limit:
            close()
            within, start, end = pack, offset, offset + length
        end = max(end, offset + length)
        members.append(name)
    close()
    return spans


def _pieces(runs: list[tuple[int, Run]]) -> Iterator[list[tuple[int, Run]]]:
    """`runs` in the order of their pack, cut into what is read at once. Blocks of the same run stay together."""
    piece: list[tuple[int, Run]] = []
    start = end = 0
    for number, run in runs:
        room = len(piece) < PIECE_BLOCKS and run.offset + run.length - start <= PIECE_BYTES
        if piece and run.offset >= end and not room:
            yield piece
            piece = []
        if not piece:
            start = run.offset
        piece.append((number, run))
        end = max(end, run.offset + run.length)
    if piece:
        yield piece


def _zero(target: memoryview) -> None:
    target[:] = bytes(len(target))
