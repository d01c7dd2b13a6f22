"""The targets of a group: marked before they are written, and brought to the newest point, where that went to the
repository first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from coordinator.model.actions import Action, Events, Keep, Seen, Submit
from coordinator.model.events import EventName
from coordinator.model.group import GroupRecord, changed
from coordinator.model.group_jobs import astray, failure, put_away, succeeded
from coordinator.model.job import JobSpec, State, Sync
from coordinator.model.mirror import Applying, begun, decided, is_synced, state_of, written
from coordinator.model.repository_uri import parse_repository
from coordinator.model.schedule import LONGEST_PAUSE_S

COMPARED = 2
"""Failures in a row after which a target is written anew, whatever it holds."""


def apply(group: GroupRecord, seen: Seen, apply_id: str, now: float) -> Action | None:
    """Bring the newest point to the targets, where it went to the repository first: beside all rounds, so that a target
    that is away keeps nobody from having points. What was begun and failed is compared the next time."""
    at_work, mirror = group.applying, group.spec.mirror
    if at_work is None:
        if mirror is None or not mirror.staged or group.paused or now < group.apply_at:
            return None
        known = {disk: state_of(group.mirrors, disk, mirror.targets[disk]) for disk in mirror.targets}
        behind = {
            disk: state
            for disk, state in known.items()
            if disk in group.covered and (state.begun or state.epoch != group.published)
        }
        if not behind:
            return None
        targets = {disk: state.target for disk, state in behind.items()}
        since = {disk: state.epoch for disk, state in behind.items() if state.is_consistent}
        begun_now = Applying(id=apply_id, point=group.published, targets=targets, since=since)
        moved = changed(group, applying=begun_now)
        return marked(f"brings {group.name}@{group.published} to its targets", group, moved, targets, group.published)
    jobs = {disk: seen.jobs.get(job_id) for disk, job_id in apply_jobs(at_work).items()}
    if missing := [disk for disk, job in jobs.items() if job is None]:
        return Submit({apply_jobs(at_work)[disk]: _apply_spec(group, at_work, disk) for disk in missing})
    found = [job for job in jobs.values() if job is not None]
    if (steer := astray(group, found, now)) is not None:
        return steer
    if not all(job.state is State.CONCLUDED for job in found):
        return None
    after = put_away(changed(group, applying=None), found)
    if failed := [f"{disk}: {failure(job)}" for disk, job in jobs.items() if job and not succeeded(job)]:
        opened = {disk: at_work.targets[disk] for disk, job in jobs.items() if job is not None and job.disk_size}
        again = {
            "apply_failures": group.apply_failures + 1,
            "apply_at": now + min(2.0**group.apply_failures, LONGEST_PAUSE_S),
            "mirrors": written(group.mirrors, opened),
        }
        return Keep(f"cannot bring {group.name}@{at_work.point} to its targets: {failed[0]}", changed(after, **again))
    done = decided(group.mirrors, at_work.targets, at_work.point)
    kept = changed(after, mirrors=done, apply_failures=0, apply_at=0.0)
    return Keep(f"has brought {group.name}@{at_work.point} to its targets", kept, target_events(group, kept))


def apply_jobs(applying: Applying) -> dict[str, str]:
    """By VM/DISK."""
    return {disk: f"{applying.id}-apply-{number}" for number, disk in enumerate(applying.targets)}


def _apply_spec(group: GroupRecord, applying: Applying, disk: str) -> JobSpec:
    uri = parse_repository(group.spec.repository).repository
    state = state_of(group.mirrors, disk, applying.targets[disk])
    since = applying.since.get(disk, 0)
    compares = state.is_ours and group.apply_failures <= COMPARED  # it may have another size now
    return JobSpec(
        source=str(replace(uri, group=group.name, disk=disk, point=applying.point, since=since)),
        target=state.target,
        sync=Sync.TOP if since else Sync.INCREMENTAL if compares else Sync.FULL,
        adds=since > 0,
        overwrite=state.is_ours or (group.spec.mirror is not None and group.spec.mirror.overwrite),
        of_group=group.name,
    )


def marked(sentence: str, before: GroupRecord, group: GroupRecord, targets: Mapping[str, str], number: int) -> Keep:
    """With its targets marked before anything is written there."""
    kept = changed(group, mirrors=begun(group.mirrors, targets, number))
    return Keep(sentence, kept, target_events(before, kept))


def target_events(before: GroupRecord, after: GroupRecord) -> Events:
    now = is_synced(after.mirrors)
    if now == is_synced(before.mirrors):
        return ()
    facts = {"group": after.name, "epoch": max(state.epoch for state in after.mirrors.values()), "synced": now}
    return ((EventName.MIRROR_STATE_CHANGE, facts),)
