"""The next action of a group's round: the control loop's decisions about groups, without its I/O.

What a round has begun is found again by its name (jobs are called after it, its epoch by its number), so every action
may be taken again; a round moves on (`Keep`) only by what is seen of jobs and epochs, never by having asked for it.
All or nothing: whatever one disk or one machine fails at ends the round, and the point before it stays the newest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator.model.actions import (
    Action,
    Begin,
    Cancel,
    Dismiss,
    Finalize,
    GiveUp,
    Keep,
    Retire,
    Seen,
    Steer,
    Submit,
)
from coordinator.model.complete import Completion, after_failure, after_pass
from coordinator.model.epoch import EpochSpec, GoKey, Phase
from coordinator.model.events import EventName
from coordinator.model.group import OUTCOMES_KEPT, GroupRecord, Outcome, Round, Stage, changed
from coordinator.model.group_jobs import astray, failure, put_away, succeeded
from coordinator.model.job import JobRecord, JobSpec, State
from coordinator.model.mirror import decided as decided_mirrors
from coordinator.model.mirror import state_of, written
from coordinator.model.point import MirroredDisk
from coordinator.model.round_jobs import (
    copy_jobs,
    copy_specs,
    end_job,
    job_ids,
    manifest_of,
    opening_job,
    owner_of,
    publish_job,
)
from coordinator.model.schedule import LONGEST_PAUSE_S, due_at, misses_rpo, prune_is_due
from coordinator.model.targets import apply, apply_jobs, marked, target_events
from coordinator.model.task import (
    AbandonEpoch,
    DecidedEpoch,
    OpenedEpoch,
    OpenEpoch,
    PublishEpoch,
    RepositoryTask,
    TaskKind,
)

END_WITHIN_S = 3600.0
"""For so long the repository is asked how an epoch was decided; by then its hold is stale, and others end it."""


def jobs_of(group: GroupRecord) -> tuple[str, ...]:
    """Every job that a round of the group may have, and those that it is done with."""
    others = (*group.done_with, *((group.prune_job,) if group.prune_job else ()))
    applying = apply_jobs(group.applying) if group.applying is not None else {}
    return (*others, *applying.values(), *(job_ids(group.round) if group.round is not None else ()))


def next_action(group: GroupRecord, seen: Seen, round_id: str, now: float) -> Action | None:
    """None: wait for jobs, agents or users. A new round is called `round_id`."""
    if (told := _tell_rpo(group, now)) is not None:
        return told
    if group.done_with:
        found = [job for job_id in group.done_with if (job := seen.jobs.get(job_id)) is not None]
        there = tuple(job.id for job in found if job.state is State.CONCLUDED)
        if there:
            return Dismiss(there)
        return Keep("has put away the jobs of its last round", changed(group, done_with=()))
    if (pruning := _prune(group, seen, now)) is not None:
        return pruning
    if (applying := apply(group, seen, round_id, now)) is not None:
        return applying
    if group.round is None:
        return _begin(group, round_id, now) if _is_due(group, now) else None
    is_given_up = group.cancelled == group.round.id and group.round.stage not in (Stage.PUBLISHING, Stage.ENDING)
    if is_given_up:
        return _end(group, group.round, "cancelled by its user", now)
    if (steer := _steer(group, group.round, seen, now)) is not None:
        return steer
    return _STAGES[group.round.stage](group, group.round, seen, now)


def _is_due(group: GroupRecord, now: float) -> bool:
    if group.paused or group.completed:
        return False
    if group.completing is not None:
        return now >= group.completing.next_at
    due = due_at(group)
    return bool(group.requests) or (due is not None and now >= due)


def _tell_rpo(group: GroupRecord, now: float) -> Keep | None:
    """An event when the newest point becomes too old, and one when it is not any more. None when it may now be of any
    age: nothing has recovered."""
    missed = misses_rpo(group, now)
    if missed == group.rpo_missed:
        return None
    rpo, age = group.spec.policy.rpo, now - group.published_cut_at
    if rpo == 0:
        return Keep("has no recovery point objective any more, which it missed", changed(group, rpo_missed=False))
    facts = {"group": group.name, "epoch": group.published, "rpo_s": rpo, "age_s": round(age, 3)}
    name = EventName.RPO_MISSED if missed else EventName.RPO_RECOVERED
    told = f"has a newest point of {age:.1f} s, and may have one of {rpo:g} s"
    return Keep(told, changed(group, rpo_missed=missed), ((name, facts),))


def _prune(group: GroupRecord, seen: Seen, now: float) -> Action | None:
    """A job beside all rounds. One that fails is left for people to look at, and tried again after the next point."""
    if group.prune_job:
        job = seen.jobs.get(group.prune_job)
        if job is None:
            retention, repository = group.spec.policy.retention, group.spec.repository
            task = RepositoryTask(kind=TaskKind.PRUNE, repository=repository, groups=(group.name,), retention=retention)
            return Submit({group.prune_job: JobSpec(task=task)})
        if job.state is not State.CONCLUDED:
            return None
        told = "has removed what no rule keeps" if succeeded(job) else f"could not prune: {failure(job)}"
        return Keep(told, changed(put_away(group, [job]), prune_job=""))
    if not prune_is_due(group, now):
        return None
    job_id = f"prune-{group.name}-{group.published}"
    return Keep("removes what no rule keeps", changed(group, prune_job=job_id, pruned=group.published, pruned_at=now))


def _steer(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Steer | None:
    return astray(group, [job for copy in copy_jobs(at_work) if (job := seen.jobs.get(copy)) is not None], now)


def _begin(group: GroupRecord, round_id: str, now: float) -> Keep:
    begun = Round(id=round_id, spec=group.spec, begun_at=now, requests=group.requests, leaving=group.leaving)
    if (completing := group.completing) is not None:
        ends = not completing.pivots and group.published > 0 and not group.seeding
        leaving = (*group.leaving, *group.spec.members) if ends else group.leaving
        pivot_s = completing.downtime_s if completing.is_ripe and group.spec.written_targets else 0.0
        begun = begun.model_copy(update={"completes": ends or pivot_s > 0, "leaving": leaving, "pivot_s": pivot_s})
    return Keep("begins a round", changed(group, round=begun, requests=()))


def _opening(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Action | None:
    job_id = opening_job(at_work)
    job = seen.jobs.get(job_id)
    if job is None:
        task = OpenEpoch(
            repository=at_work.spec.repository,
            group=group.name,
            owner=owner_of(group.name, at_work.id),
            at_least=group.counted + 1,
            disks=at_work.spec.disks,
            targets=at_work.spec.written_targets,
        )
        return Submit({job_id: JobSpec(task=task)})
    if job.state is not State.CONCLUDED:
        return None
    if not succeeded(job):
        return _end(group, at_work, failure(job), now)
    opened = OpenedEpoch.model_validate_json(job.result)
    moved = at_work.model_copy(
        update={
            "stage": Stage.STARTING,
            "number": opened.number,
            "repository": opened.repository,
            "parents": opened.parents,
            "pins": opened.pins,
            "sizes": opened.sizes,
            "seeded": opened.seeded,
        }
    )
    after = changed(group, round=moved, counted=max(group.counted, opened.number))
    sentence = f"has announced epoch {opened.number}"
    if not at_work.pivot_s:
        return Keep(sentence, after)
    if missing := [disk for disk in at_work.spec.disks if disk not in opened.parents or disk in opened.seeded]:
        return _end(after, moved, f"the target of {missing[0]} does not have all of it yet", now)
    return marked(sentence, group, after, at_work.spec.written_targets, opened.number)


def _starting(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Action | None:
    epoch = seen.epoch
    if epoch is not None and epoch.number == at_work.number:
        return Keep("has begun its epoch", _moved(group, at_work, Stage.CUTTING))
    if epoch is not None and epoch.number > at_work.number:
        counted = max(group.counted, epoch.number)
        return _end(
            changed(group, counted=counted), at_work, f"the ledger has counted to {epoch.number} meanwhile", now
        )
    if epoch is not None and not epoch.is_over:
        return GiveUp(epoch.number, "another one is begun")
    if seen.busy:
        return None
    policy = at_work.spec.policy
    spec = EpochSpec(
        participants=at_work.spec.members,
        prepare_ms=round(policy.prepare_timeout * 1000),
        freeze_ms=round((at_work.pivot_s or policy.freeze_timeout) * 1000),
        hold_ms=round(policy.hold_timeout * 1000),
        consistency=policy.consistency,
        views=policy.views,
        leaving=at_work.leaving,
        repository=at_work.repository,
        parents=at_work.parents,
        sizes=at_work.sizes,
        seeded=at_work.seeded,
        slice_bytes=policy.seed_slice,
        pivots=at_work.spec.written_targets if at_work.pivot_s else {},
        targets=at_work.spec.written_targets if not at_work.pivot_s else {},
    )
    return Begin(spec, at_work.number - 1)


def _cutting(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Action | None:
    if lost := _lost(at_work, seen):
        return _end(group, at_work, lost, now)
    assert seen.epoch is not None
    if seen.epoch.phase is not Phase.READABLE:
        return None
    if at_work.pivot_s:
        return Keep("has moved to its targets", _moved(group, at_work, Stage.PUBLISHING))
    targets = at_work.spec.written_targets
    return marked("is cut, and can be read", group, _moved(group, at_work, Stage.COPYING), targets, at_work.number)


def _copying(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Action | None:
    if lost := _lost(at_work, seen):
        return _end(group, at_work, lost, now)
    assert seen.epoch is not None
    copies = copy_jobs(at_work)
    missing = [job_id for job_id in copies if job_id not in seen.jobs]
    if missing:
        specs = dict(zip(copies, copy_specs(group, at_work, seen.epoch), strict=True))
        return Submit({job_id: specs[job_id] for job_id in missing})
    jobs = [seen.jobs[job_id] for job_id in copies]
    for disk, job in zip(at_work.spec.disks, jobs, strict=True):
        if job.state is State.CONCLUDED and not succeeded(job):
            return _end(group, at_work, f"{disk}: {failure(job)}", now)
    if not all(job.state in (State.PENDING, State.CONCLUDED) for job in jobs):
        return None
    return Keep("is copied", _moved(group, at_work, Stage.PUBLISHING))


def _publishing(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Action | None:
    job_id, copies = publish_job(at_work), copy_jobs(at_work)
    job = seen.jobs.get(job_id)
    if job is None:
        if lost := _lost(at_work, seen):
            return _end(group, at_work, lost, now)
        results = not at_work.spec.written_targets
        gone = [copy for copy in copies if copy not in seen.jobs or (results and not seen.jobs[copy].result)]
        if gone:
            return _end(group, at_work, f"what job {gone[0]} copied is lost", now)
        assert seen.epoch is not None
        task = PublishEpoch(
            repository=at_work.spec.repository,
            owner=owner_of(group.name, at_work.id),
            decision=manifest_of(group, at_work, seen, seen.epoch),
        )
        return Submit({job_id: JobSpec(task=task)})
    if job.state is not State.CONCLUDED:
        return None
    if not succeeded(job):
        return _end(group, at_work, failure(job), now)
    going = [job for copy in copies if (job := seen.jobs.get(copy)) and job.state is not State.CONCLUDED]
    if going:
        pending = tuple(job.id for job in going if not job.finalize_requested)
        return Finalize(pending) if pending else None
    if (retire := _retire(at_work, seen)) is not None:
        return retire
    return _over(group, at_work, seen, now)


def _ending(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Action | None:
    epoch = seen.epoch
    if epoch is not None and epoch.number >= at_work.number and not epoch.is_over:
        return GiveUp(epoch.number, at_work.why)
    begun = [opening_job(at_work), *copy_jobs(at_work), publish_job(at_work)]
    going = [job for job_id in begun if (job := seen.jobs.get(job_id)) and job.state is not State.CONCLUDED]
    if going:
        cancelled = tuple(job.id for job in going if job.cancel_requested != "force")
        return Cancel(cancelled) if cancelled else None
    job_id = end_job(at_work)
    job = seen.jobs.get(job_id)
    if job is None and at_work.number > 0:
        if now < at_work.end_at:
            return None
        task = AbandonEpoch(
            repository=at_work.spec.repository,
            group=group.name,
            owner=owner_of(group.name, at_work.id),
            number=at_work.number,
            why=at_work.why,
            mirrors=_touched(group, at_work),
        )
        return Submit({job_id: JobSpec(task=task)})
    if job is not None and job.state is not State.CONCLUDED:
        return None
    if job is not None and not succeeded(job) and now < at_work.ending_at + END_WITHIN_S:
        # Its manifest may be there: what is not known must not be told as failed.
        again = {"ends": at_work.ends + 1, "end_at": now + min(2.0**at_work.ends, LONGEST_PAUSE_S)}
        waiting = at_work.model_copy(update=again)
        told = f"cannot tell yet whether epoch {at_work.number} was published: {failure(job)}"
        return Keep(told, changed(group, round=waiting, done_with=(job.id,)))
    return _over(group, at_work, seen, now)


_STAGES = {
    Stage.OPENING: _opening,
    Stage.STARTING: _starting,
    Stage.CUTTING: _cutting,
    Stage.COPYING: _copying,
    Stage.PUBLISHING: _publishing,
    Stage.ENDING: _ending,
}


def _over(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> Keep:
    """Published by whichever job found its manifest."""
    jobs = [seen.jobs.get(job_id) for job_id in (publish_job(at_work), end_job(at_work))]
    decided = next((found for job in jobs if job is not None and (found := _decided(job)) and found.is_point), None)
    if decided is not None:
        return _published(group, at_work, seen, decided, now)
    group = put_away(group, _rounds_own(at_work, seen))
    group = changed(group, mirrors=written(group.mirrors, _opened_targets(group, at_work, seen)))
    group = _not_completed(group, at_work, seen, now)
    aborted = {"group": group.name, "epoch": at_work.number, "error": at_work.why}
    outcome = _outcome(at_work, now).model_copy(update={"requests": at_work.requests, "why": at_work.why})
    return Keep(
        f"ends its round without a point: {at_work.why}",
        changed(group, round=None, outcomes=(*group.outcomes, outcome)[-OUTCOMES_KEPT:]),
        ((EventName.GROUP_ABORTED, aborted),),
    )


def _published(group: GroupRecord, at_work: Round, seen: Seen, decided: DecidedEpoch, now: float) -> Keep:
    """A point for whoever asked, if it has every disk; one that the group's age is told by, if it has those that the
    point before had; else a step on the way there."""
    before, group = group, put_away(group, _rounds_own(at_work, seen))
    changes: dict[str, Any] = {
        "round": None,
        "leaving": tuple(one for one in group.leaving if one not in at_work.leaving),
        "seeding": decided.seeding,
    }
    outcome, outcomes = _outcome(at_work, now), group.outcomes
    if decided.seeding:
        changes["requests"] = (*at_work.requests, *group.requests)
    else:
        outcome = outcome.model_copy(update={"requests": at_work.requests})
    if decided.disks and set(group.covered).intersection(at_work.spec.disks) <= set(decided.disks):
        outcome = outcome.model_copy(update={"published": True, "cut_at": decided.cut_at})
        # Hosts' clocks say it, and ours when the next round is due: it was cut in this round, whatever they show.
        cut_at = min(max(decided.cut_at, at_work.begun_at), now)
        changes |= {"published": at_work.number, "published_cut_at": cut_at, "covered": decided.disks}
        sentence = f"has published {group.name}@{at_work.number}"
    else:
        outcome = outcome.model_copy(update={"is_step": True})
        outcomes = outcomes[:-1] if outcomes and outcomes[-1].is_step else outcomes
        sentence = f"has copied a further part, as {group.name}@{at_work.number}"
    if at_work.spec.written_targets:
        targets = at_work.spec.written_targets
        whole = {disk: target for disk, target in targets.items() if disk in decided.disks}
        changes["mirrors"] = written(decided_mirrors(group.mirrors, whole, at_work.number), targets)
    kept = changed(group, outcomes=(*outcomes, outcome)[-OUTCOMES_KEPT:], **changes)
    return _completed(Keep(sentence, kept, target_events(before, kept)), at_work, seen, decided, now)


def _completed(published: Keep, at_work: Round, seen: Seen, decided: DecidedEpoch, now: float) -> Keep:
    """The same, of a group whose end was asked for."""
    group = published.group
    completing = group.completing
    if completing is None or decided.seeding:
        return published
    if not at_work.completes:
        took_s = now - at_work.begun_at
        return replace(published, group=changed(group, completing=after_pass(completing, took_s)))
    cuts = seen.epoch.cuts if seen.epoch is not None and seen.epoch.number == at_work.number else {}
    completion = Completion(
        id=completing.id,
        done=True,
        pivoted=at_work.pivot_s > 0,
        point=at_work.number,
        downtimes_ms={
            member.vm: round(cuts[member.vm].freeze_ms, 3)
            for member in at_work.spec.members
            if at_work.pivot_s and member.vm in cuts
        },
    )
    told = {"group": group.name, **completion.model_dump(include={"point", "pivoted", "downtimes_ms"})}
    live = tuple(at_work.spec.written_targets.values()) if at_work.pivot_s else group.live
    ended = changed(group, completing=None, completion=completion, completed=True, live=live)
    return replace(published, group=ended, events=(*published.events, (EventName.GROUP_COMPLETED, told)))


def _not_completed(group: GroupRecord, at_work: Round, seen: Seen, now: float) -> GroupRecord:
    completing = group.completing
    if completing is None:
        return group
    went = at_work.pivot_s > 0 and _touched(group, at_work) != () and _may_have_gone(at_work, seen)
    is_cancelled = group.cancelled == at_work.id and not went and not completing.went
    again = after_failure(completing, now, went=went) if not is_cancelled else None
    failed = Completion(id=completing.id, done=False, why=at_work.why) if again is None else group.completion
    return changed(group, completing=again, completion=failed)


def _may_have_gone(at_work: Round, seen: Seen) -> bool:
    """Whether a machine may have moved, as far as can be told."""
    epoch = seen.epoch
    return epoch is None or epoch.number != at_work.number or epoch.key is GoKey.GO or epoch.doubtful


def _outcome(at_work: Round, now: float) -> Outcome:
    return Outcome(
        round=at_work.id,
        requests=(),
        number=at_work.number,
        published=False,
        begun_at=at_work.begun_at,
        ended_at=now,
    )


def _rounds_own(at_work: Round, seen: Seen) -> list[JobRecord]:
    return [job for job_id in job_ids(at_work) if (job := seen.jobs.get(job_id)) is not None]


def _opened_targets(group: GroupRecord, at_work: Round, seen: Seen) -> dict[str, str]:
    """By VM/DISK, those that were found fit to be written, so that some of it may have been."""
    touched = {mirror.disk: mirror.target for mirror in _touched(group, at_work)}
    if at_work.pivot_s:
        return touched
    jobs = dict(zip(at_work.spec.disks, copy_jobs(at_work), strict=True))
    opened = {disk for disk, job_id in jobs.items() if job_id in seen.jobs and seen.jobs[job_id].disk_size}
    return {disk: target for disk, target in touched.items() if disk in opened}


def _touched(group: GroupRecord, at_work: Round) -> tuple[MirroredDisk, ...]:
    """Targets that may have been written in this round."""
    return tuple(
        MirroredDisk(disk=disk, target=target, size=at_work.sizes.get(disk, 0), sync="")
        for disk, target in at_work.spec.written_targets.items()
        if state_of(group.mirrors, disk, target).begun == at_work.number > 0
    )


def _end(group: GroupRecord, at_work: Round, why: str, now: float) -> Keep:
    ending = at_work.model_copy(update={"stage": Stage.ENDING, "why": why, "ending_at": now})
    return Keep(f"gives its round up: {why}", changed(group, round=ending))


def _lost(at_work: Round, seen: Seen) -> str:
    """Why nothing can come of the round's epoch any more; "" while something can."""
    if seen.epoch is None or seen.epoch.number != at_work.number:
        return f"the ledger has lost epoch {at_work.number}"
    if seen.epoch.phase is Phase.RETIRED:
        return "it was published, and the ledger has lost that"
    return seen.epoch.why if seen.epoch.phase is Phase.ABORTED else ""


def _retire(at_work: Round, seen: Seen) -> Retire | None:
    """Agents may drop what they hold. An epoch that was aborted or lost meanwhile is published all the same: its
    bitmaps go with the next one."""
    is_ours = seen.epoch is not None and seen.epoch.number == at_work.number
    return Retire(at_work.number) if is_ours and seen.epoch and seen.epoch.phase is Phase.READABLE else None


def _decided(job: JobRecord) -> DecidedEpoch | None:
    """What a job tells that publishes an epoch or ends it; None if it has failed."""
    is_there = succeeded(job) and isinstance(job.spec.task, PublishEpoch | AbandonEpoch)
    return DecidedEpoch.model_validate_json(job.result) if is_there else None


def _moved(group: GroupRecord, at_work: Round, stage: Stage) -> GroupRecord:
    return changed(group, round=at_work.model_copy(update={"stage": stage}))
