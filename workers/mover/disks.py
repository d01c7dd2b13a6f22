"""The open source and target of the job at hand, kept between its units."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from coordinator.ledger.contract import LedgerUnavailableError
from coordinator.model.errors import DiskIOError, FlushpointError, Next, RefusedError, Side
from coordinator.model.job import JobRecord, Sync
from coordinator.model.uri import DiskUri, parse
from coordinator.settings import Settings
from workers.access import Access
from workers.mover.fastpath import FastPath, open_fast_path
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import SessionLimits
from workers.sources import open_source
from workers.sources.contract import Source
from workers.targets import open_target
from workers.targets.contract import Target


class OpenError(Exception):
    """A disk of a job could not be opened, or not be read while it was planned."""

    def __init__(self, side: Side, error: FlushpointError) -> None:
        super().__init__(str(error))
        self.side = side
        self.error = error


@contextlib.contextmanager
def opening(side: Side) -> Iterator[None]:
    """Say which disk an error is about. A ledger that is away is no disk's fault."""
    try:
        yield
    except LedgerUnavailableError:
        raise
    except FlushpointError as error:
        raise OpenError(side, error) from error


class Disks:
    """At most one pair is open; opening another job's, or the next pass's, closes it.

    A qcow2 image is opened anew for each pass: a reader opened before its writer flushed goes on reading the old
    metadata (tried with QEMU 7.2: it still reads zeroes after the flush).
    """

    def __init__(self, settings: Settings) -> None:
        self.access = Access(settings.allowed_roots, settings.allowed_endpoints)
        self._relay_tls_dir = settings.relay_tls_dir
        self.limits = SessionLimits(settings.connections, settings.io_timeout_s)
        self._one_reader: set[str] = set()
        """Jobs whose source lets one process in. Found out by waiting in vain, which is done once."""
        self._open_for = ("", 0)
        self._source: Source | None = None
        self._target: Target | None = None
        self._fast: FastPath | None = None
        self._fast_sought = False
        self._fast_pays = False

    def open(self, job: JobRecord) -> tuple[Source, Target]:
        """Both disks of a planned job, or OpenError."""
        if self._open_for != (job.id, job.pass_number):
            self.close()
            self._open_for = (job.id, job.pass_number)
        if self._source is None:
            with opening(Side.SOURCE):
                self._source = self._source_of_old_size(job)
        if self._target is None:
            with opening(Side.TARGET):
                self._target = self.open_target(job, job.disk_size, create=False)
        return self._source, self._target

    @property
    def max_movers(self) -> int:
        """How many movers may hold the open pair at once; 0 is unlimited."""
        if self._target is None or self._open_for[0] in self._one_reader:
            return 1
        return self._target.max_writers

    def fast_path(self) -> FastPath | None:
        """The fast path of the open pair, if it has one that is worth taking."""
        if not self._fast_sought and self._source is not None and self._target is not None:
            self._fast_sought = True
            if self._open_for[0] not in self._one_reader:  # a connection of its own would be waited for in vain
                self._fast = open_fast_path(self._source, self._target, self.limits.timeout_s)
            self._fast_pays = True
        return self._fast if self._fast_pays else None

    def leave_fast_path(self) -> None:
        """It does not pay for this pair. It stays open, since what it wrote is still to be flushed."""
        self._fast_pays = False

    def flush_target(self) -> None:
        """Everything written to the open target, by whatever path, is durable. DiskIOError if it may not be."""
        if self._fast is not None:
            try:
                self._fast.flush()
            except DiskIOError as error:  # a lost connection, as to the target's own flush: opened anew, it may do
                raise DiskIOError(
                    error.message, errno_=error.errno, next_=Next.RECONNECT, remedy=error.remedy
                ) from error
        if self._target is not None:
            self._target.flush()

    def drop_fast_path(self) -> None:
        """It failed: do without it while this pair is open."""
        if self._fast is not None:
            self._fast.close()
            self._fast = None

    def _source_of_old_size(self, job: JobRecord) -> Source:
        source = self.open_source(job)
        if source.size == job.disk_size:
            return source
        source.close()
        raise RefusedError(
            f"the source {job.spec.source} changed its size from {job.disk_size} to {source.size} bytes while it was"
            " mirrored",
            "submit the job again",
        )

    def open_source(self, job: JobRecord) -> Source:
        spec = job.spec
        limits = replace(self.limits, connections=1) if job.id in self._one_reader else self.limits
        bitmap = spec.bitmap
        if spec.sync is not Sync.DIRTY:
            # A later pass looks for what was written during the one before, of which the bitmap may know nothing.
            bitmap = job.bitmap if job.bitmap and job.pass_number == 1 else None
        sync = Sync.DIRTY if bitmap else spec.sync
        source = open_source(self._source_uri(job), sync, bitmap, self.access, limits)
        if source.max_readers == 1:
            self._one_reader.add(job.id)
        return source

    def _source_uri(self, job: JobRecord) -> DiskUri:
        uri = _source_uri(job)
        if not job.spec.group or uri.kind != "nbd" or not self._relay_tls_dir:
            return uri
        relay = Endpoint.parse(uri.nbd_uri)
        if relay.tls is None:
            return uri
        tls = replace(relay.tls, certificates=self._relay_tls_dir)  # which its agent could not know
        return replace(uri, nbd_uri=str(replace(relay, tls=tls)))

    def open_target(self, job: JobRecord, size: int, *, create: bool) -> Target:
        """With `create` the target is made or cut to size; it holds an older copy in the sync modes that update one."""
        return open_target(
            parse(job.spec.target),
            size,
            self.access,
            overwrite=job.spec.overwrite,
            create=create,
            keep=job.spec.sync in (Sync.DIRTY, Sync.INCREMENTAL) or job.spec.adds or job.pass_number > 1,
            limits=self.limits,
        )

    def keep(self, job: JobRecord, source: Source, target: Target) -> None:
        """Take over a pair that was opened for planning."""
        self.close()
        self._open_for, self._source, self._target = (job.id, job.pass_number), source, target

    def open_source_anew(self, job: JobRecord) -> None:
        """In place of the open pair's, which is closed first: its server may let in one client only. OpenError."""
        source, self._source = self._source, None
        if source is not None:
            source.close()
        with opening(Side.SOURCE):
            self._source = self._source_of_old_size(job)

    def abort(self) -> None:
        """Break off whatever waits for a server, from another thread. The disks are of no more use, and still open."""
        for disk in (self._fast, self._source, self._target):
            if disk is not None:
                disk.abort()

    def close(self) -> None:
        self.drop_fast_path()
        self._fast_sought = False
        source, target = self._source, self._target
        self._source = self._target = None
        self._open_for = ("", 0)
        if source is not None:
            source.close()
        if target is not None:
            target.close()


def _source_uri(job: JobRecord) -> DiskUri:
    """With the recovery point that was the newest when the job was planned: half of it and half of the next would be
    a disk that never was."""
    uri = parse(job.spec.source)
    if uri.repository is None or not job.source_point:
        return uri
    return replace(uri, repository=replace(uri.repository, point=job.source_point))
