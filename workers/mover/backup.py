"""The mover's part in jobs whose target is a repository: an epoch is opened, written, and published or abandoned.

    plan      open_first   hold written, parent chosen
    copy      copy         blocks into a pack; the ledger keeps the pack's name with the finished unit
    settle    settle       the packs' maps into a root
    complete  publish      the manifest
    abort     abandon      the tombstone

A pass over a source that may have changed is followed by another, which stands on the root of the one before.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from coordinator.ledger.contract import Ledger
from coordinator.model.errors import DiskIOError, FlushpointError, Next, NotFoundError, RefusedError, Side
from coordinator.model.extent import Extent, Status, unpack_extents
from coordinator.model.job import JobRecord, State, Sync
from coordinator.model.point import Decision, SeedMember, tracking_bitmap
from coordinator.model.repository_uri import RepositoryUri
from coordinator.model.task import EpochPart
from coordinator.model.units import Claim
from coordinator.model.uri import disk_name, parse
from coordinator.settings import Settings
from workers.access import Access
from workers.mover.engine import Failure, Outcome
from workers.mover.lease import Lease
from workers.mover.rate import RateLimit
from workers.repository.archive import DEPTH, Archive, Stopped
from workers.repository.collect import condemned_packs, forbidden_packs
from workers.repository.decisions import HOLD_RENEW_S
from workers.repository.epochs import Epoch, abandon, collect_maps, open_epoch, publish, renew, reopen, write_disk_root
from workers.repository.index import NoIndex, RunIndex, SqliteIndex
from workers.repository.layout import DamageError, pack_key
from workers.repository.pack import Origin, PackRef
from workers.repository.reader import PointDisk
from workers.repository.repository import Repository
from workers.repository.root import Root, RootRef
from workers.repository.store.contract import StoreError
from workers.sources.contract import Source


class Backups:
    """At most one repository and one epoch of it are open; another job's closes them."""

    def __init__(self, ledger: Ledger, settings: Settings, access: Access) -> None:
        self._ledger = ledger
        self._access = access
        self._cache = Path(settings.cache_dir) if settings.cache_dir else None
        self._pool = ThreadPoolExecutor(DEPTH, thread_name_prefix="backup")
        self._open_for = ("", 0)
        self._repository: Repository | None = None
        self._archive: Archive | None = None
        self._renewed_at = -HOLD_RENEW_S
        """Monotonic; of the open job's hold."""

    def open_first(self, job: JobRecord, claim: Claim, source: Source) -> tuple[dict[str, object], str]:
        """Open the job's epoch. What the job's record is to keep, and which bitmap of the source would tell what was
        written since the parent; if none would, the record says why. Changes nothing but a hold."""
        uri = self._uri(job)
        group, disk = names(job)
        if job.spec.part is not None:
            return self._open_part(job, job.spec.part, claim, source), ""
        with self._repository_of(job) as repository:
            self._check_source(repository, source)
            owner = self._ledger.reserve(job.id, claim.unit_id, claim.token, f"repository {repository.id} {group}")
            if owner not in (None, job.id):
                raise RefusedError(
                    f"job {owner} is writing group {group!r} in {uri.repository}",
                    "wait until it has concluded, or cancel it",
                )
            epoch = open_epoch(repository, group, disk, _owner(job), self.is_over)
            try:
                epoch, lost = _without_lost_parent(repository, epoch, job.spec.sync)
                comparing, reason = _how(job, epoch, source.size)
                bitmap, untrusted = _bitmap(job, repository, epoch) if comparing else ("", "")
            except FlushpointError as error:
                abandon(repository, group, epoch.number, f"job {job.id}: {error.message}")
                raise
        member = epoch.parent_member
        facts = {
            "group": group,
            "disk": disk,
            "epoch": epoch.number,
            "parent_epoch": epoch.parent.epoch if epoch.parent else 0,
            "target_zeroed": not comparing and job.spec.sync is not Sync.DIRTY,
            "on_parent": member is not None
            and member.size == source.size
            and job.spec.sync not in (Sync.FULL, Sync.TOP),
            "compare_reason": lost or reason or untrusted,
            "cut_at": time.time(),
        }
        return facts, bitmap

    def _open_part(self, job: JobRecord, part: EpochPart, claim: Claim, source: Source) -> dict[str, object]:
        """The same for a job of a group's epoch, which others have announced and will decide. Nothing is compared: the
        source holds what was written since the parent, or all of the disk, and blocks that the parent has are known by
        their digests."""
        group, disk = names(job)
        with self._repository_of(job) as repository:
            name = f"repository {repository.id} {group} {disk}"
            owner = self._ledger.reserve(job.id, claim.unit_id, claim.token, name)
            if owner not in (None, job.id):
                raise RefusedError(f"job {owner} is writing {disk} of group {group!r}", "wait until it has concluded")
            epoch = reopen(repository, group, part.number, disk, _owner(job), part.parent, part.pins)
            renew(repository, epoch)
            member = epoch.parent_member
            if part.since and (member is None or part.since != part.parent or member.size != source.size):
                raise RefusedError(
                    f"what was written to {disk} since point {part.since} adds to no point of {source.size} bytes",
                    "take the next checkpoint, which copies all of it",
                )
        return {
            "group": group,
            "disk": disk,
            "epoch": part.number,
            "parent_epoch": part.parent,
            "target_zeroed": not part.since,
            "on_parent": part.since > 0,
            "compare_reason": part.reason,
            "cut_at": part.cut_at,
        }

    def copy(self, job: JobRecord, claim: Claim, source: Source, lease: Lease) -> tuple[Outcome, str]:
        """Write a unit; the pack's name if all of it is done, or the failure and everything as remaining."""
        extents = unpack_extents(claim.extents)
        rate = RateLimit(self._ledger, job)

        def go_on(length: int) -> bool:
            self._renew_hold(job)  # one slow unit may take hours
            return lease.halt is None and rate.admit(length, lease)

        try:
            self._renew_hold(job)  # before the archive looks at what it must not refer to
            archive = self._archive_of(job)
            written = archive.write_unit(_Blamed(source), extents, self._pool, go_on)
        except Stopped:
            return Outcome(remaining=extents), ""
        except _SourceError as failed:
            error = failed.error
            where = Extent(max(error.offset, 0), error.length, Status.DATA)
            return Outcome(failures=[Failure(Side.SOURCE, error, where)], remaining=extents), ""
        except FlushpointError as error:
            self.close()
            where = Extent(claim.start, claim.end - claim.start, Status.DATA)
            return Outcome(failures=[Failure(Side.TARGET, _target_error(error), where)], remaining=extents), ""
        # Of a source that may change it has to be known whether anything differed, also what needed no storing.
        sent = written.bytes_changed if job.source_may_change and job.compared else written.bytes_sent
        outcome = Outcome(bytes_read=written.bytes_read, bytes_sent=sent)
        return outcome, str(written.pack) if written.pack else ""

    def settle(self, job: JobRecord, packs: list[str]) -> dict[str, object]:
        """Write the root of this pass; what the job's record is to keep of it."""
        self._renew_hold(job)
        with self._repository_of(job) as repository:
            epoch = self._epoch(repository, job)
            maps = collect_maps(repository, job.disk, [PackRef.parse(text) for text in packs])
            root = write_disk_root(repository, epoch, self._base_root(repository, job), job.disk_size, maps)
            facts: dict[str, object] = {"pass_root": str(root)}
            if job.spec.part is not None:
                member = epoch.member_of(root, job.disk_size).model_copy(update=_told(job))
                if seeded := job.spec.part.seeded:
                    member = SeedMember(**member.model_dump(), seeded=seeded)
                facts["result"] = member.model_dump_json()
            elif job.source_may_change:
                facts["cut_at"] = time.time()
            return facts

    def publish(self, job: JobRecord) -> Decision:
        """Decide the epoch by its manifest. Done again, it finds its own decision and is content."""
        with self._repository_of(job) as repository:
            epoch = self._epoch(repository, job)
            member = epoch.member_of(RootRef.parse(job.pass_root), job.disk_size).model_copy(update=_told(job))
            decision = Decision(
                decision="manifest",
                repository=repository.id,
                group=job.group,
                epoch=job.epoch,
                job=job.id,
                cut_at=job.cut_at,
                decided_at=time.time(),
                consistency="crash",
                members=(member,),
                spec=job.spec.model_dump(mode="json", exclude_defaults=True),
            )
            return publish(repository, epoch, decision)

    def abandon(self, job: JobRecord) -> Decision:
        """End the epoch without result; what was decided, which is a point if this job has published it after all."""
        why = job.error or "cancelled"
        with self._repository_of(job) as repository:
            return abandon(repository, job.group, job.epoch, f"job {job.id}: {why}")

    def close(self) -> None:
        self._open_for = ("", 0)
        self._renewed_at = -HOLD_RENEW_S
        archive, self._archive = self._archive, None
        if archive is not None:
            archive.index.close()
        repository, self._repository = self._repository, None
        if repository is not None:
            repository.close()

    # -- what is open --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _repository_of(self, job: JobRecord) -> Iterator[Repository]:
        if self._open_for != (job.id, job.pass_number):
            self.close()
            self._open_for = (job.id, job.pass_number)
        if self._repository is None:
            self._repository = Repository.open(self._uri(job).repository, self._access)
        try:
            yield self._repository
        except StoreError as error:  # for the error policy
            self.close()
            raise _target_error(error) from error
        except BaseException:
            self.close()
            raise

    def _archive_of(self, job: JobRecord) -> Archive:
        with self._repository_of(job) as repository:
            if self._archive is None:
                epoch = self._epoch(repository, job)
                _check_parent(job, epoch)
                member = epoch.parent_member
                parent = repository.disk_of(member) if member else None
                base = self._base_disk(repository, job, parent)
                self._archive = Archive(
                    repository,
                    Origin(job.group, job.epoch),
                    job.disk,
                    job.disk_size,
                    base=base,
                    known=base or parent,
                    exact=job.spec.sync is Sync.TOP,
                    shunned=condemned_packs(repository, "shun"),
                    index=self._index(repository),
                )
            return self._archive

    def _index(self, repository: Repository) -> RunIndex:
        if self._cache is None:
            return NoIndex()

        def is_there(pack: bytes) -> bool:
            return repository.store.size(pack_key(pack)) is not None

        path = self._cache / f"blocks-{repository.id}.sqlite"
        return SqliteIndex(path, forbidden_packs(repository), is_there)

    def _base_disk(self, repository: Repository, job: JobRecord, parent: PointDisk | None) -> PointDisk | None:
        """What blocks keep that this pass does not cover."""
        if job.pass_root:
            return PointDisk(job.disk, self._base_root(repository, job), repository.fetcher)
        return parent if job.on_parent else None

    def _base_root(self, repository: Repository, job: JobRecord) -> Root:
        if job.pass_root:
            return Root.load(RootRef.parse(job.pass_root), repository.store, repository.keyring)
        epoch = self._epoch(repository, job)
        _check_parent(job, epoch)
        parent = epoch.parent_member
        if job.on_parent and parent is not None:
            return repository.root(parent)
        return Root.empty(job.disk_size, repository.store, repository.keyring)

    @staticmethod
    def _epoch(repository: Repository, job: JobRecord) -> Epoch:
        pins = job.spec.part.pins if job.spec.part else None
        return reopen(repository, job.group, job.epoch, job.disk, _owner(job), job.parent_epoch, pins)

    def _renew_hold(self, job: JobRecord) -> None:
        if time.monotonic() - self._renewed_at < HOLD_RENEW_S:
            return
        with self._repository_of(job) as repository:
            renew(repository, self._epoch(repository, job))
        self._renewed_at = time.monotonic()

    # -- questions -----------------------------------------------------------------------------------------

    @staticmethod
    def _uri(job: JobRecord) -> RepositoryUri:
        uri = parse(job.spec.target).repository
        assert uri is not None
        return uri

    def goes_on(self, owner: str) -> bool:
        """Whether an epoch's owner is a job of this ledger that has not concluded, though it may be paused."""
        return self._state_of(owner) not in (None, State.CONCLUDED)

    def is_over(self, owner: str) -> bool:
        """Whether an epoch's owner is a job of this ledger that has concluded; of another's nobody here can tell."""
        return self._state_of(owner) is State.CONCLUDED

    def _state_of(self, owner: str) -> State | None:
        """None where that cannot be told. A round of a group runs until it is over."""
        kind, name, _, round_id, *_ = [*owner.split(" "), "", "", ""]
        try:
            if kind == "group":
                now = self._ledger.group(name).round
                return State.RUNNING if now is not None and now.id == round_id else State.CONCLUDED
            return self._ledger.job(name).job.state if kind == "job" else None
        except NotFoundError:
            return None

    @staticmethod
    def _check_source(repository: Repository, source: Source) -> None:
        identity = source.identity()
        if identity[0] == "repository" and identity[1] == repository.id:
            raise RefusedError(
                f"the source is a point of the same repository, {repository.store.name}", "name another target"
            )


class _SourceError(Exception):
    def __init__(self, error: DiskIOError) -> None:
        super().__init__(str(error))
        self.error = error


class _Blamed:
    """A source whose errors are told from those of the repository."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            self._source.read_into(offset, buffer)
        except DiskIOError as error:
            raise _SourceError(error) from error


def _owner(job: JobRecord) -> str:
    return located(job.spec.part.owner if job.spec.part else f"job {job.id}")


def located(owner: str) -> str:
    """An epoch's owner, for people, who want to know where it is at work as well."""
    return f"{owner} on {socket.gethostname()}"


def _told(job: JobRecord) -> dict[str, object]:
    """What its manifest says of how a disk was copied."""
    part = job.spec.part
    if part is not None:
        how = {"sync": str(Sync.INCREMENTAL if part.parent else Sync.FULL), "reason": part.reason}
    else:
        how = {
            "sync": str(job.spec.sync),
            "reason": f"by bitmap {job.bitmap!r}" if job.bitmap else job.compare_reason,
        }
    return {**how, "bytes_read": job.bytes_read, "bytes_sent": job.bytes_sent}


def names(job: JobRecord) -> tuple[str, str]:
    """(group, disk) of a job's target: as given, or the source's name for both."""
    uri = parse(job.spec.target).repository
    assert uri is not None
    own = disk_name(parse(job.spec.source))
    return uri.group or own, uri.disk or own


def _without_lost_parent(repository: Repository, epoch: Epoch, sync: Sync) -> tuple[Epoch, str]:
    """(the epoch, why it has no parent): one whose root is damaged or gone would fail every point to come, and so is
    left out. RefusedError for a bitmap, which says what differs from just that point, and so mends no page of it."""
    member = epoch.parent_member
    if member is None:
        return epoch, ""
    if isinstance(member, SeedMember):
        return replace(epoch, parent=None), "a group has begun to copy this disk, so all of it was stored"
    try:
        load = repository.whole_root if sync is Sync.DIRTY else repository.root
        load(member)
    except DamageError as error:
        if sync is Sync.DIRTY:
            raise RefusedError(
                f"the recovery point that the bitmap would add to is damaged: {error.message}",
                "copy the disk with --sync incremental, which stores all of it anew",
            ) from error
        return replace(epoch, parent=None), "the newest recovery point is damaged, so all of it was stored"
    return epoch, ""


def _how(job: JobRecord, epoch: Epoch, size: int) -> tuple[bool, str]:
    """(whether contents are compared, why), or an error where the parent that is needed is not there."""
    member = epoch.parent_member
    sync = job.spec.sync
    if sync is Sync.DIRTY and epoch.may_have_newer_parent:
        raise RefusedError(
            f"{_damage(epoch)}, and it may be that point which the bitmap would add to",
            "copy the disk with --sync incremental, which compares",
        )
    if sync is Sync.DIRTY and member is None:
        raise NotFoundError(
            f"group {epoch.group!r} has no recovery point of disk {epoch.disk!r} that a bitmap could add to",
            "make a full copy first",
        )
    if sync is Sync.DIRTY and member is not None and member.size != size:
        raise RefusedError(
            f"disk {epoch.disk!r} has {size} bytes, and {member.size} in its newest recovery point",
            "copy it with --sync incremental, which compares",
        )
    if sync is not Sync.INCREMENTAL:
        return False, ""
    if member is None and epoch.missed:
        return False, f"{_damage(epoch)}, so all of it was stored"
    if member is None:
        return False, "there is no recovery point yet, so all of it was stored"
    if member.size != size:
        return False, "the disk has changed its size, so all of it was compared"
    return True, ""


def _damage(epoch: Epoch) -> str:
    return f"the decision about epoch {epoch.missed} of group {epoch.group!r} was found damaged"


def _bitmap(job: JobRecord, repository: Repository, epoch: Epoch) -> tuple[str, str]:
    """(the bitmap of the source that would tell what differs from the parent, or why there is none)"""
    bitmap = job.spec.bitmap
    if bitmap and epoch.may_have_newer_parent:
        return "", f"{_damage(epoch)}, so all of it was compared"
    bitmap = bitmap or _tracking_bitmap(job, repository, epoch)
    member = epoch.parent_member
    if not bitmap or member is None:
        return "", "an export does not tell whether its bitmap is recording"
    try:
        repository.whole_root(member)
    except DamageError:  # a bitmap would leave most of what the page covers as it is
        return "", "the newest recovery point is damaged, so all of it was compared"
    return bitmap, ""


def _tracking_bitmap(job: JobRecord, repository: Repository, epoch: Epoch) -> str:
    """Looked for unasked, and so only in images, which tell whether it is recording; an export does not. Its name says
    which point it adds to, whatever there may be that is newer."""
    source = parse(job.spec.source)
    if epoch.parent is None or source.kind == "nbd":
        return ""
    return tracking_bitmap(repository.id, epoch.group, epoch.parent.epoch)


def _check_parent(job: JobRecord, epoch: Epoch) -> None:
    """What stands on a point that is gone would read as zeroes wherever nothing was written."""
    if job.on_parent and not job.pass_root and epoch.parent_member is None:
        raise RefusedError(
            f"recovery point {job.parent_epoch} of group {job.group!r}, which this job builds on, is gone",
            "submit the job again",
        )


def _target_error(error: FlushpointError) -> DiskIOError:
    """An error of the repository as one of the job's target, for its error policy."""
    if isinstance(error, DiskIOError):
        return error
    number = error.errno if isinstance(error, StoreError) else errno.EIO
    next_ = Next.GIVE_UP if isinstance(error, DamageError | RefusedError) else Next.RECONNECT
    return DiskIOError(error.message, errno_=number, next_=next_, remedy=error.remedy)
