"""The jobs of a round: how they are called, what copies are told to do, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from coordinator.model.actions import Seen
from coordinator.model.epoch import DiskCopy, Epoch
from coordinator.model.group import GroupRecord, Round
from coordinator.model.job import JobRecord, JobSpec, Sync
from coordinator.model.mirror import state_of
from coordinator.model.point import PIVOT, Decision, MachineCut, Member, MirroredDisk, SeedMember
from coordinator.model.repository_uri import parse_repository
from coordinator.model.task import EpochPart


def owner_of(group: str, round_id: str) -> str:
    """As the hold of its epoch names it."""
    return f"group {group} round {round_id}"


def job_ids(at_work: Round) -> tuple[str, ...]:
    return (opening_job(at_work), *copy_jobs(at_work), publish_job(at_work), end_job(at_work))


def opening_job(at_work: Round) -> str:
    return f"{at_work.id}-open"


def copy_jobs(at_work: Round) -> list[str]:
    """None of a pivot: its machines copy."""
    return [_job(at_work, str(number)) for number, _ in enumerate(at_work.spec.disks)] if not at_work.pivot_s else []


def publish_job(at_work: Round) -> str:
    return _job(at_work, "publish")


def end_job(at_work: Round) -> str:
    return _job(at_work, f"end-{at_work.ends}" if at_work.ends else "end")


def _job(at_work: Round, what: str) -> str:
    """With the epoch's number: a ledger that has lost writes may find the round announcing another one."""
    return f"{at_work.id}-{at_work.number}-{what}"


def copy_specs(group: GroupRecord, at_work: Round, epoch: Epoch) -> list[JobSpec]:
    """One a disk, in their order."""
    uri = parse_repository(at_work.spec.repository).repository
    specs = []
    for member in at_work.spec.members:
        copies = {copy.disk: copy for copy in epoch.reads[member.vm].copies}
        for name in member.disks:
            copy, disk = copies[name], f"{member.vm}/{name}"
            spec = JobSpec(
                source=copy.uri or copy.path,
                target=str(replace(uri, group=group.name, disk=disk)),
                sync=Sync.TOP if copy.since else Sync.FULL,
                source_frozen=True,
                auto_finalize=False,
            )
            if (mirror := at_work.spec.mirror) is not None and not mirror.staged:
                target = mirror.targets[disk]
                may = mirror.overwrite or state_of(group.mirrors, disk, target).is_ours
                to = {"target": target, "adds": copy.since > 0, "overwrite": may, "of_group": group.name}
                specs.append(spec.model_copy(update=to))
            else:
                specs.append(spec.model_copy(update={"part": _part(group, at_work, epoch, disk, copy)}))
    return specs


def _part(group: GroupRecord, at_work: Round, epoch: Epoch, disk: str, copy: DiskCopy) -> EpochPart:
    return EpochPart(
        number=at_work.number,
        owner=owner_of(group.name, at_work.id),
        pins=at_work.pins,
        parent=at_work.parents.get(disk, 0),
        since=copy.since,
        reason=copy.reason,
        cut_at=_cut_at(epoch),
        seeded=copy.seeded,
    )


def manifest_of(group: GroupRecord, at_work: Round, seen: Seen, epoch: Epoch) -> Decision:
    cuts = epoch.cuts
    machines = [
        MachineCut(
            vm=member.vm,
            cut_at=cuts[member.vm].cut_at,
            freeze_ms=round(cuts[member.vm].freeze_ms, 3),
            filesystem_consistent=cuts[member.vm].filesystem_consistent,
            fallback=cuts[member.vm].fallback,
        )
        for member in at_work.spec.members
    ]
    is_quiet = all(machine.filesystem_consistent for machine in machines)
    copies = copy_jobs(at_work)
    jobs = {disk: seen.jobs[job_id] for disk, job_id in zip(at_work.spec.disks, copies, strict=True)} if copies else {}
    parts = {disk for disk, copy in _disk_copies(at_work, epoch).items() if copy.seeded}
    stored = {} if at_work.spec.written_targets else jobs
    whole = set(at_work.spec.disks) - parts
    return Decision(
        decision="manifest",
        repository=at_work.repository,
        group=group.name,
        epoch=at_work.number,
        job=owner_of(group.name, at_work.id),
        cut_at=_cut_at(epoch),
        consistency=("filesystem" if is_quiet else "crash") if whole else "",
        members=tuple(Member.model_validate_json(job.result) for disk, job in stored.items() if disk not in parts),
        seeding=tuple(SeedMember.model_validate_json(job.result) for disk, job in stored.items() if disk in parts),
        mirrors=_mirrored(at_work, epoch, jobs) if jobs else _pivoted(at_work),
        machines=tuple(machines),
        spec=at_work.spec.model_dump(mode="json", exclude_defaults=True),
    )


def _mirrored(at_work: Round, epoch: Epoch, jobs: Mapping[str, JobRecord]) -> tuple[MirroredDisk, ...]:
    copies = _disk_copies(at_work, epoch)
    return tuple(
        MirroredDisk(
            disk=disk,
            target=target,
            size=copies[disk].size,
            seeded=copies[disk].seeded,
            sync=str(Sync.INCREMENTAL if copies[disk].since else Sync.FULL),
            reason=copies[disk].reason,
            parent=at_work.parents.get(disk, 0),
            bytes_read=jobs[disk].bytes_read,
            bytes_sent=jobs[disk].bytes_sent,
        )
        for disk, target in at_work.spec.written_targets.items()
    )


def _pivoted(at_work: Round) -> tuple[MirroredDisk, ...]:
    return tuple(
        MirroredDisk(
            disk=disk, target=target, size=at_work.sizes[disk], sync=PIVOT, parent=at_work.parents.get(disk, 0)
        )
        for disk, target in at_work.spec.written_targets.items()
    )


def _disk_copies(at_work: Round, epoch: Epoch) -> dict[str, DiskCopy]:
    """By VM/DISK."""
    reads = ((member.vm, copy) for member in at_work.spec.members for copy in epoch.reads[member.vm].copies)
    return {f"{vm}/{copy.disk}": copy for vm, copy in reads}


def _cut_at(epoch: Epoch) -> float:
    """Of the point: the earliest of its machines', so that no age of it is understated; 0 if none was cut."""
    return min((cut.cut_at for cut in epoch.cuts.values()), default=0.0)
