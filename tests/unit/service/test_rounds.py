"""Rounds of a group over the in-memory ledger: whatever fails, dies or comes late, a point is whole or is not there."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.ledger import MemoryBarrier, MemoryLedger, Versioned
from coordinator.model.complete import Completion
from coordinator.model.epoch import (
    CutFacts,
    DiskCopy,
    DiskView,
    Epoch,
    EpochSpec,
    GoKey,
    Participant,
    Phase,
    ReadFacts,
    ViewKind,
)
from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError
from coordinator.model.extent import Extent, Status
from coordinator.model.group import (
    FAILED_JOBS_KEPT,
    GroupPolicy,
    GroupRecord,
    GroupSpec,
    GroupVerb,
    Round,
    Stage,
    respecified,
    told,
    told_to_complete,
)
from coordinator.model.job import JobRecord, JobSpec, State, Sync, Verb
from coordinator.model.mirror import MirrorSpec
from coordinator.model.point import Decision, Member, Retention, SeedMember
from coordinator.model.round_jobs import owner_of
from coordinator.model.step import VerbArguments, apply_verb
from coordinator.model.task import (
    AbandonEpoch,
    DecidedEpoch,
    EpochPart,
    OpenEpoch,
    PublishEpoch,
    RepositoryTask,
    TaskKind,
)
from coordinator.model.units import UnitKind, plan_units
from coordinator.service.control import ControlLoop
from coordinator.settings import Settings

LEASE_MS = 1000
DISK_BYTES = 100
MEMBERS = (
    Participant(vm="db", host="hv1", qmp="/db", disks=("vda", "vdb")),
    Participant(vm="web", host="hv2", qmp="/web", disks=("vda",)),
)
SPEC = GroupSpec(repository="repo+file:///r", members=MEMBERS, policy=GroupPolicy(freeze_timeout=5, hold_timeout=60))
SETTINGS = Settings(cycle_s=0.0005, leader_ttl_s=5, max_attempts=2)


class CountingLedger(MemoryLedger):
    """Counts the records of jobs that are read."""

    jobs_read = 0

    def job(self, job_id: str) -> Versioned:
        self.jobs_read += 1
        return super().job(job_id)

    def jobs_named(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        self.jobs_read += len(ids)
        return super().jobs_named(ids)


class World:
    """A ledger whose clock is ours, a repository of decisions, movers, agents and coordinators that may die."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.ledger = CountingLedger(lambda: self.now)
        self.decisions: dict[int, Decision] = {}
        self.holds: dict[int, str] = {}
        self.copied: dict[int, set[str]] = {}
        """By epoch, the disks whose roots were written."""
        self.slice = DISK_BYTES
        """How much an agent copies of a disk that is not seeded."""
        self.targets: dict[str, list[JobSpec]] = {}
        """Of mirrors: the jobs that have written there."""
        self.lost = ""
        """A disk whose bitmaps are gone."""
        self.skew_s = 0.0
        """Of the hosts' clocks."""
        self.control = self.coordinator()
        self.ledger.put_group(GroupRecord(name="shop", spec=SPEC))

    def coordinator(self) -> ControlLoop:
        return ControlLoop(self.ledger, SETTINGS, lambda: None, lambda: self.now)

    @property
    def group(self) -> GroupRecord:
        return self.ledger.group("shop")

    def ask(self) -> str:
        request = secrets.token_hex(4)
        group = self.group
        self.ledger.put_group(group.model_copy(update={"requests": (*group.requests, request)}))
        return request

    def cycle(self) -> None:
        self.now += 0.01
        for _ in range(3):
            self.control.cycle()

    def replace_coordinator(self) -> None:
        """The one before sleeps on, and may go on whenever it likes."""
        self.now += 6
        self.control = self.coordinator()

    # -- movers ------------------------------------------------------------------------------------------------

    def mover(self, fails: Callable[[], bool]) -> bool:
        """One unit is done, fails, or its mover dies in the middle; whether there was one."""
        claim = self.ledger.claim("m", secrets.token_hex(8), LEASE_MS)
        if claim is None:
            return False
        job = self.ledger.job(claim.job_id).job
        if fails():
            self._release(claim.job_id, claim.unit_id, claim.token, {"fatal": True, "error": "it cannot be"})
            return True
        facts: dict[str, Any] = {}
        task = job.spec.task
        try:
            if isinstance(task, OpenEpoch):
                facts["result"] = json.dumps(self._open(task))
            elif isinstance(task, PublishEpoch):
                facts["result"] = result_of(self._decide(task.decision, task.owner), task.owner)
            elif isinstance(task, AbandonEpoch):
                facts["result"] = result_of(self._abandon(task), task.owner)
            elif claim.kind is UnitKind.PLAN:
                facts = {"disk_size": DISK_BYTES, "epoch": job.spec.part.number if job.spec.part else 0}
            elif claim.kind is UnitKind.COPY and job.spec.target.startswith("/"):
                self.targets.setdefault(job.spec.target, []).append(job.spec)
            elif claim.kind is UnitKind.SETTLE and job.spec.part is not None:
                disk = job.spec.target.partition("disk=")[2]
                self.copied.setdefault(job.spec.part.number, set()).add(disk)
                facts["result"] = member(disk, job.spec.part).model_dump_json()
        except RefusedError as error:
            self._release(claim.job_id, claim.unit_id, claim.token, {"fatal": True, "error": error.message})
            return True
        if fails():
            return True  # dead; what it did to the repository stays
        self.ledger.opened(claim.job_id, claim.unit_id, claim.token, facts)
        if claim.kind is UnitKind.PLAN:
            units = list(plan_units([Extent(0, DISK_BYTES, Status.DATA)], DISK_BYTES))
            self.ledger.add_units(claim.job_id, claim.unit_id, claim.token, UnitKind.COPY, 0, DISK_BYTES, units)
        self.ledger.finish(claim.job_id, claim.unit_id, claim.token)
        return True

    def _release(self, job_id: str, unit_id: str, token: str, changes: dict[str, Any]) -> None:
        self.ledger.release(
            job_id,
            unit_id,
            token,
            remaining=(self.ledger.job(job_id).job.spec.task is None and "0:1") or "",
            done_bytes=0,
            bytes_read=0,
            bytes_sent=0,
            count_attempt=False,
            changes=changes,
        )

    def _open(self, task: OpenEpoch) -> dict[str, Any]:
        for number, owner in list(self.holds.items()):
            if number not in self.decisions and owner != task.owner:
                at_work = self.group.round
                if at_work is not None and owner == owner_of("shop", at_work.id):
                    raise RefusedError("somebody writes it")
                self.decisions[number] = tombstone(number)
        mine = [n for n, owner in self.holds.items() if owner == task.owner and n not in self.decisions]
        number = mine[0] if mine else max([0, *self.decisions, *self.holds, task.at_least - 1]) + 1
        self.holds[number] = task.owner
        points = [n for n, d in self.decisions.items() if d.is_point and (d.mirrors != ()) == (task.targets != {})]
        parent = max(points, default=0)
        parents = dict.fromkeys(task.disks, parent) if parent else {}
        seeding = self.decisions[parent].seeding if parent else ()
        return {
            "repository": "r",
            "number": number,
            "parents": parents,
            "pins": [parent] if parent else [],
            "sizes": dict.fromkeys(parents, DISK_BYTES),
            "seeded": {one.disk: one.seeded for one in seeding},
        }

    def _decide(self, decision: Decision, owner: str) -> Decision:
        decided = self.decisions.setdefault(decision.epoch, decision)
        if not decided.is_point or decided.job != owner:
            raise RefusedError("it was decided by somebody else")
        return decided

    def _abandon(self, task: AbandonEpoch) -> Decision:
        ended = tombstone(task.number).model_copy(update={"mirrors": task.mirrors})
        return self.decisions.setdefault(task.number, ended)

    # -- agents ------------------------------------------------------------------------------------------------

    def agent(self, vm: str, fails: Callable[[], bool]) -> None:
        """The next part of a machine in the epoch, if it has one."""
        epoch = self.ledger.newest_epoch("shop")
        if epoch is None or epoch.is_over or vm not in epoch.spec.vms:
            return
        asyncio.run(self._take_part(MemoryBarrier(self.ledger), epoch, vm, fails))

    async def _take_part(self, barrier: MemoryBarrier, epoch: Epoch, vm: str, fails: Callable[[], bool]) -> None:
        disks = epoch.participant(vm).disks
        if fails():
            if epoch.key is GoKey.OPEN:
                await barrier.abort(epoch, vm, "its disk hangs")
            elif epoch.phase in (Phase.CUTTING, Phase.TAKEN):
                await barrier.fail_cut(epoch, vm, "its view broke")
        elif epoch.phase is Phase.PREPARING:
            await barrier.prepared(epoch, vm)
        elif epoch.phase is Phase.FREEZING:
            await barrier.frozen(epoch, vm)
        elif epoch.phase is Phase.CUTTING:
            views = tuple(DiskView(disk=disk, kind=ViewKind.STAGE) for disk in disks if not epoch.spec.pivots)
            facts = CutFacts(cut_at=self.now + self.skew_s, freeze_ms=1, filesystem_consistent=False, views=views)
            await barrier.cut(epoch, vm, facts)
        elif epoch.phase is Phase.TAKEN:
            copies = tuple(self._copy(epoch.spec, vm, disk) for disk in disks if not epoch.spec.pivots)
            await barrier.readable(epoch, vm, ReadFacts(copies=copies))

    def _copy(self, spec: EpochSpec, vm: str, disk: str) -> DiskCopy:
        since = spec.parent(vm, disk) if self.lost != f"{vm}/{disk}" else 0
        held = spec.seeded.get(f"{vm}/{disk}", DISK_BYTES) if since else 0
        seeded = held + self.slice if held + self.slice < DISK_BYTES else 0
        return DiskCopy(disk=disk, path=f"/{vm}/{disk}.qcow2", size=DISK_BYTES, since=since, seeded=seeded)

    def step(self) -> None:
        self.now += 0.05
        self.mover(lambda: False)
        for one in MEMBERS:
            self.agent(one.vm, lambda: False)

    def prunes(self) -> list[str]:
        return [job.id for job in self.ledger.jobs() if job.id.startswith("prune-")]

    # -- what must be so ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Nothing fails any more: all that was asked for ends."""
        for _ in range(300):
            self.now += 2
            self.cycle()
            while self.mover(lambda: False):
                self.cycle()
            for one in MEMBERS:
                self.agent(one.vm, lambda: False)
            group = self.group
            if group.round is None and not group.requests and not group.done_with:
                epoch = self.ledger.newest_epoch("shop")
                assert epoch is None or epoch.is_over, "agents hold views for nobody"
                return
        pytest.fail(f"it does not end: {self.group!r} {self.ledger.jobs()!r} {self.ledger.newest_epoch('shop')!r}")

    def settle_targets(self) -> None:
        """And the newest point is at the targets."""
        self.settle()
        for _ in range(100):
            self.now += 2
            self.cycle()
            while self.mover(lambda: False):
                self.cycle()
            if self.group.applying is None and all(
                s.epoch == self.group.published for s in self.group.mirrors.values()
            ):
                return
        pytest.fail(f"it does not end: {self.group!r}")

    def check(self) -> None:
        group = self.group
        for number, decision in self.decisions.items():
            if decision.is_point:
                assert {m.disk for m in decision.roots} == set(SPEC.disks) == self.copied[number]
                assert len({m.parent for m in decision.roots}) == 1
                (parent,) = {m.parent for m in decision.roots}
                assert parent == 0 or self.decisions[parent].is_point
        for outcome in group.outcomes:
            if outcome.number:
                assert (outcome.published or outcome.is_step) == self.decisions[outcome.number].is_point, outcome
                assert outcome.published == (self.decisions[outcome.number].members != ()), outcome
            else:
                assert not outcome.published
        epoch = self.ledger.newest_epoch("shop")
        if epoch is not None and epoch.phase is Phase.RETIRED:
            assert self.decisions[epoch.number].is_point


def member(disk: str, part: EpochPart) -> Member:
    whole = Member(
        disk=disk.replace("%2F", "/"),
        size=DISK_BYTES,
        root="r",
        directory_offset=0,
        directory_length=1,
        root_digest="",
        sync="full",
        parent=part.parent,
    )
    return SeedMember(**whole.model_dump(), seeded=part.seeded) if part.seeded else whole


def result_of(decision: Decision, owner: str) -> str:
    return (DecidedEpoch.by(decision) if decision.job == owner else DecidedEpoch(is_point=False)).model_dump_json()


def tombstone(number: int) -> Decision:
    return Decision(decision="tombstone", repository="r", group="shop", epoch=number)


@pytest.fixture
def world() -> World:
    return World()


def test_a_checkpoint_becomes_a_point_of_all_disks(world: World) -> None:
    request = world.ask()
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert (outcome.published, outcome.number) == (True, 1)
    assert world.group.published == 1
    assert world.ledger.jobs() == []
    epoch = world.ledger.newest_epoch("shop")
    assert epoch is not None
    assert epoch.phase is Phase.RETIRED
    world.check()


def jobs_read_by_a_round(disks: int) -> int:
    """Whose movers do all they can between two turns of the coordinator, which only ever answers wakes."""
    world = World()
    member = Participant(vm="db", host="hv1", qmp="/db", disks=tuple(f"vd{n}" for n in range(disks)))
    put(world, spec=SPEC.model_copy(update={"members": (member,)}))
    world.control.cycle()
    world.control._next_sweep = float("inf")
    world.ask()
    before = world.ledger.jobs_read
    while not world.group.published or world.ledger.jobs():
        while world.control.cycle():
            pass
        while world.mover(lambda: False):
            pass
        world.agent("db", lambda: False)
    return world.ledger.jobs_read - before


def test_a_round_of_twice_as_many_disks_reads_about_twice_as_many_jobs() -> None:
    """Each of which wakes the leader several times."""
    few, many = jobs_read_by_a_round(20), jobs_read_by_a_round(40)
    assert few < 20 * 60
    assert many < 2.2 * few


def test_a_later_point_adds_to_the_one_before(world: World) -> None:
    world.ask()
    world.settle()
    world.ask()
    while not world.copied.get(2):
        world.cycle()
        world.mover(lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, lambda: False)
    (vda,) = [job for job in world.ledger.jobs() if job.id.endswith("-0")]
    assert vda.spec.part is not None
    assert (vda.spec.sync, vda.spec.part.since, vda.spec.part.pins) == (Sync.TOP, 1, (1,))
    world.settle()
    assert [member.parent for member in world.decisions[2].members] == [1, 1, 1]


def test_a_checkpoint_that_is_asked_for_during_a_round_is_another_one(world: World) -> None:
    """Whoever asks wants what was written until then."""
    first = world.ask()
    world.cycle()
    assert world.group.round is not None
    second, third = world.ask(), world.ask()
    world.settle()
    outcomes = [world.group.outcome_for(request) for request in (first, second, third)]
    assert [outcome.number if outcome else 0 for outcome in outcomes] == [1, 2, 2]


def test_one_copy_that_fails_ends_all_of_it(world: World) -> None:
    request = world.ask()
    fail = iter([False, False, False, False, True])  # the opening, then both halves of two units
    until_copied(world, lambda: next(fail, False))
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert not outcome.published
    assert "it cannot be" in outcome.why
    assert outcome.why.startswith(("db/vda", "db/vdb", "web/vda"))
    assert not world.decisions[1].is_point
    assert "GROUP_ABORTED" in {event["event"] for event in world.ledger.events(limit=1000)}
    states = {job.state for job in world.ledger.jobs()}
    assert states == {State.CONCLUDED}
    world.check()
    world.ask()
    world.settle()
    assert world.group.published == 2


def until_copied(world: World, fails: Callable[[], bool]) -> None:
    for _ in range(40):
        world.cycle()
        world.mover(fails if world.group.round and world.group.round.stage is Stage.COPYING else lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, lambda: False)


def test_a_job_that_its_user_cancels_ends_all_of_it(world: World) -> None:
    request = world.ask()
    while not any(job.id.endswith("-1") for job in world.ledger.jobs()):
        world.cycle()
        world.mover(lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, lambda: False)
    (second,) = [job for job in world.ledger.jobs() if job.id.endswith("-1")]
    found = world.ledger.job(second.id)
    world.ledger.update(second.id, found.version, apply_verb(found.job, Verb.CANCEL, VerbArguments()).changes)
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert outcome.why == f"db/vdb: job {second.id} was cancelled"
    world.check()


def dies_when_done() -> Callable[[], bool]:
    """Of a mover that does what its unit asks for, and is dead before it can say so."""
    fates = iter([False, True])
    return lambda: next(fates, False)


def test_a_manifest_whose_job_was_lost_is_found(world: World) -> None:
    """The mover that wrote it dies with its last attempt, and the round is told that it failed."""
    request = world.ask()
    while not world.decisions:
        world.cycle()
        publishing = world.group.round is not None and world.group.round.stage is Stage.PUBLISHING
        world.mover(dies_when_done() if publishing else lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, lambda: False)
    (publish,) = [job for job in world.ledger.jobs() if job.id.endswith("-publish")]
    found = world.ledger.job(publish.id)
    world.ledger.update(publish.id, found.version, {"cancel_requested": "force"})
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert outcome.published
    assert world.group.published == 1
    world.check()


def test_whether_there_is_a_point_is_asked_until_the_repository_answers(world: World) -> None:
    """Its manifest was written, its mover died, and then the store was away: nobody may be told that it failed."""
    request = world.ask()
    while not world.decisions:
        world.cycle()
        publishing = world.group.round is not None and world.group.round.stage is Stage.PUBLISHING
        world.mover(dies_when_done() if publishing else lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, lambda: False)
    (publish,) = [job for job in world.ledger.jobs() if job.id.endswith("-publish")]
    found = world.ledger.job(publish.id)
    world.ledger.update(publish.id, found.version, {"cancel_requested": "force"})
    for _ in range(40):
        world.now += 3
        world.cycle()
        world.mover(lambda: True)
    assert world.group.outcome_for(request) is None
    assert world.group.round is not None
    assert world.group.round.ends > 2
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert outcome.published
    assert world.ledger.jobs() == []
    world.check()


def test_a_disk_larger_than_its_slices_is_a_point_when_all_of_it_is_copied(world: World) -> None:
    world.slice = 40
    request = world.ask()
    world.settle()
    assert {number: [one.seeded for one in d.seeding] for number, d in world.decisions.items()} == {
        1: [40, 40, 40],
        2: [80, 80, 80],
        3: [],
    }
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert (outcome.published, outcome.number) == (True, 3)
    assert [one.number for one in world.group.outcomes] == [2, 3], "of the steps the last one is told"
    assert world.group.seeding == {}
    world.check()


def test_a_step_that_fails_costs_that_step_alone(world: World) -> None:
    world.slice = 40
    request = world.ask()
    while not world.decisions.get(1):
        world.cycle()
        world.step()
    copying(world)
    world.mover(lambda: True)
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert not outcome.published
    assert world.group.seeding["db/vda"] == (40, DISK_BYTES)
    request = world.ask()
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert (outcome.published, outcome.number) == (True, 4), "2 was aborted, 3 copied up to 80"


def test_a_disk_that_is_copied_anew_keeps_the_point_before_the_newest(world: World) -> None:
    """Its bitmap was lost. Points of the others alone are no news for the objective."""
    world.ask()
    world.settle()
    assert world.group.covered == SPEC.disks
    world.slice = 40
    world.lost = "web/vda"
    request = world.ask()
    while not world.group.seeding:
        world.cycle()
        world.step()
    assert {one.disk for one in world.decisions[2].members} == {"db/vda", "db/vdb"}
    assert world.group.published == 1
    world.lost = ""
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert (outcome.number, world.group.published) == (4, 4)


def test_a_member_that_is_new_does_not_keep_others_from_having_points(world: World) -> None:
    with_policy(world, rpo=30.0)
    spec = world.group.spec
    put(world, spec=spec.model_copy(update={"members": MEMBERS[:1]}))
    world.settle()
    assert world.group.covered == ("db/vda", "db/vdb")
    put(world, spec=world.group.spec.model_copy(update={"members": MEMBERS}))
    world.slice, world.lost = 40, "web/vda"
    request = world.ask()
    while not world.group.seeding:
        world.cycle()
        world.step()
    assert world.group.published == 2
    assert world.group.outcome_for(request) is None, "who asks for a point wants all disks"
    world.lost = ""
    while world.group.outcome_for(request) is None:
        world.cycle()
        world.step()
    assert world.group.published == 4
    assert world.group.covered == SPEC.disks


TARGETS = {"db/vda": "/t/a", "db/vdb": "/t/b", "web/vda": "/t/c"}


def mirroring(world: World, *, staged: bool) -> None:
    put(world, spec=SPEC.model_copy(update={"mirror": MirrorSpec(targets=TARGETS, staged=staged)}))


def synced(world: World) -> list[bool]:
    """What events said, the oldest first."""
    found = world.ledger.events(limit=1000)
    return [e["data"]["synced"] for e in found if e["event"] == "MIRROR_STATE_CHANGE" and e["job"] == ""]


def test_targets_are_said_to_be_inconsistent_until_all_of_them_are_decided(world: World) -> None:
    mirroring(world, staged=False)
    world.ask()
    copying(world)
    assert not any(state.is_consistent for state in world.group.mirrors.values())
    assert world.targets == {}, "it is said before anything is written"
    world.settle()
    assert {(s.epoch, s.begun, s.is_consistent) for s in world.group.mirrors.values()} == {(1, 0, True)}
    assert [mirror.target for mirror in world.decisions[1].mirrors] == list(TARGETS.values())
    assert world.decisions[1].members == ()
    world.ask()
    copying(world)
    assert {(s.epoch, s.begun) for s in world.group.mirrors.values()} == {(1, 2)}
    world.mover(lambda: True)
    world.settle()
    assert {(s.epoch, s.begun) for s in world.group.mirrors.values()} == {(1, 2)}, "given up, they stay so"
    assert {mirror.disk for mirror in world.decisions[2].mirrors} == set(TARGETS)
    world.ask()
    world.settle()
    assert {(s.epoch, s.begun) for s in world.group.mirrors.values()} == {(3, 0)}
    assert synced(world) == [True, False, True]
    assert [(s.sync, s.adds, s.overwrite) for s in world.targets["/t/a"]] == [
        (Sync.FULL, False, False),
        (Sync.TOP, True, True),
    ]
    assert world.decisions[3].mirrors[0].parent == 1


def test_a_target_that_nothing_of_ours_was_written_to_is_not_overwritten(world: World) -> None:
    """Its job was refused: what is there is somebody else's, whatever was meant to be written."""
    mirroring(world, staged=False)
    world.ask()
    copying(world)
    world.mover(lambda: True)
    world.settle()
    world.ask()
    copying(world)
    specs = {
        job.spec.target: job.spec.overwrite for job in world.ledger.jobs() if job.spec.of_group and job.id[-1] in "012"
    }
    assert not any(specs.values())


def test_staged_targets_follow_the_newest_point_beside_all_rounds(world: World) -> None:
    mirroring(world, staged=True)
    world.ask()
    world.settle()
    assert world.group.published == 1
    world.settle_targets()
    assert {(s.epoch, s.begun) for s in world.group.mirrors.values()} == {(1, 0)}
    world.ask()
    world.settle_targets()
    first, second = world.targets["/t/a"]
    assert first.source == "repo+file:///r?group=shop&disk=db/vda&point=1"
    assert first.sync is Sync.FULL
    assert second.source == "repo+file:///r?group=shop&disk=db/vda&point=2&since=1"
    assert (second.sync, second.adds) == (Sync.TOP, True)
    assert synced(world) == [True, False, True]


def test_a_target_that_fails_is_tried_again_and_then_compared(world: World) -> None:
    mirroring(world, staged=True)
    world.ask()
    world.settle_targets()
    world.ask()
    while world.group.applying is None:
        world.cycle()
        world.step()
    while world.group.applying is not None:
        world.cycle()
        world.mover(lambda: True)
    assert {(s.epoch, s.begun) for s in world.group.mirrors.values()} == {(1, 2)}
    assert world.group.published == 2, "points go on"
    world.ask()
    world.settle_targets()
    assert [spec.sync for spec in world.targets["/t/a"]] == [Sync.FULL, Sync.INCREMENTAL, Sync.TOP]
    assert len({s.epoch for s in world.group.mirrors.values()}) == 1


def complete(world: World, *, pivots: bool, downtime_s: float = 60.0) -> None:
    put(world, **dict(told_to_complete(world.group, "end", pivots=pivots, downtime_s=downtime_s)))


def ended(world: World) -> Completion:
    completion = world.group.completion
    assert completion is not None
    assert world.group.completing is None
    return completion


def until_completed(world: World, fails: Callable[[], bool] = lambda: False) -> None:
    for _ in range(600):
        if world.group.completing is None and world.group.round is None and not world.group.done_with:
            return
        world.cycle()
        world.now += 0.05
        world.mover(lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, fails if one.vm == "web" else lambda: False)
    pytest.fail(f"it does not end: {world.group!r}")


def test_a_group_that_is_complete_has_a_last_point_and_is_tracked_no_more(world: World) -> None:
    with_policy(world, rpo=30.0)
    world.settle()
    complete(world, pivots=False)
    until_completed(world)
    assert ended(world) == Completion(id="end", done=True, point=world.group.published)
    epoch = world.ledger.newest_epoch("shop")
    assert epoch is not None
    assert epoch.spec.leaving == MEMBERS, "their bitmaps go"
    world.now += 100
    world.cycle()
    assert world.group.round is None
    assert "GROUP_COMPLETED" in events(world)
    put(world, **dict(told(world.group, GroupVerb.RESUME)))
    world.cycle()
    assert world.group.round is not None


def test_a_pivot_follows_passes_and_all_machines_stand_still_for_it(world: World) -> None:
    mirroring(world, staged=False)
    complete(world, pivots=True)
    until_completed(world)
    assert (ended(world).done, ended(world).pivoted, ended(world).point) == (True, True, 3)
    assert ended(world).downtimes_ms == {"db": 1.0, "web": 1.0}
    epoch = world.ledger.newest_epoch("shop")
    assert epoch is not None
    assert (epoch.spec.pivots, epoch.spec.freeze_ms, epoch.phase) == (TARGETS, 60_000, Phase.RETIRED)
    assert [mirror.sync for mirror in world.decisions[3].mirrors] == ["pivot"] * 3
    assert {(s.epoch, s.begun) for s in world.group.mirrors.values()} == {(3, 0)}
    with pytest.raises(RefusedError, match="run on its targets"):
        told(world.group, GroupVerb.RESUME)


def test_a_pivot_that_fails_before_go_leaves_all_where_they_are_and_another_pass_is_made(world: World) -> None:
    mirroring(world, staged=False)
    complete(world, pivots=True)
    until_pivoting(world, Phase.FREEZING)
    until_completed(world, once())
    assert (ended(world).done, ended(world).point) == (True, 5), "3 was the pivot that failed, 4 a pass"
    assert {mirror.disk for mirror in world.decisions[3].mirrors} == set(TARGETS)


def test_after_go_nothing_but_the_pivot_is_tried_until_all_have_moved(world: World) -> None:
    mirroring(world, staged=False)
    complete(world, pivots=True)
    for number in range(3, 9):
        until_pivoting(world, Phase.CUTTING)
        world.agent("web", lambda: True)
        until_over(world, number)
        with pytest.raises(RefusedError, match="run on their targets already"):
            told(world.group, GroupVerb.CANCEL)
    until_completed(world)
    assert (ended(world).done, ended(world).pivoted, ended(world).point) == (True, True, 9)


def test_a_move_that_has_begun_is_given_up_by_force_and_no_target_is_written_after_that(world: World) -> None:
    mirroring(world, staged=False)
    complete(world, pivots=True)
    until_pivoting(world, Phase.CUTTING)
    world.agent("web", lambda: True)
    until_over(world, 3)
    put(world, **dict(told(world.group, GroupVerb.CANCEL, force=True)))
    until_completed(world)
    assert not ended(world).done
    assert world.group.live == tuple(TARGETS.values())
    before = len(world.decisions)
    world.now += 1000
    world.cycle()
    assert (world.group.round, len(world.decisions)) == (None, before)


def test_after_a_restart_of_the_ledgers_server_nobody_is_believed_not_to_have_moved(world: World) -> None:
    """It had turned the key to GO, and lost that with its last second."""
    mirroring(world, staged=False)
    complete(world, pivots=True)
    until_pivoting(world, Phase.FREEZING)
    world.ledger.restart()
    world.replace_coordinator()
    world.agent("web", lambda: True)
    until_over(world, 3)
    assert world.group.completing is not None
    assert world.group.completing.went


def test_a_pivot_that_fails_again_and_again_is_given_up_and_the_group_goes_on(world: World) -> None:
    mirroring(world, staged=False)
    complete(world, pivots=True)
    for _ in range(600):
        world.cycle()
        world.now += 0.2
        world.mover(lambda: False)
        epoch = world.ledger.newest_epoch("shop")
        for one in MEMBERS:
            world.agent(one.vm, lambda e=epoch: bool(e and e.spec.pivots))  # type: ignore[misc]
        if world.group.completing is None:
            break
    assert not ended(world).done
    assert "its disk hangs" in ended(world).why
    assert not world.group.completed


def test_a_pivot_is_cancelled_before_it_is_decided_and_not_after(world: World) -> None:
    mirroring(world, staged=False)
    complete(world, pivots=True)
    until_pivoting(world, Phase.FREEZING)
    put(world, **dict(told(world.group, GroupVerb.CANCEL)))
    until_completed(world)
    assert (ended(world).done, ended(world).why) == (False, "cancelled by its user")
    world.ask()
    world.settle()

    put(world, **dict(told_to_complete(world.group, "again", pivots=True, downtime_s=60.0)))
    until_pivoting(world, Phase.CUTTING)
    put(world, **dict(told(world.group, GroupVerb.CANCEL)))
    until_completed(world)
    assert (ended(world).done, ended(world).id) == (True, "again"), "some may have moved, and so all do"


def test_targets_that_guests_run_on_are_written_by_no_pass(world: World) -> None:
    mirroring(world, staged=False)
    complete(world, pivots=True)
    other = SPEC.model_copy(update={"mirror": MirrorSpec(targets={disk: f"/u{n}" for n, disk in enumerate(TARGETS)})})
    with pytest.raises(RefusedError, match="is completing"):
        respecified(world.group, other)
    until_completed(world)
    again = world.group.spec.model_copy(update={"policy": GroupPolicy(rpo=30.0)})
    with pytest.raises(RefusedError, match="runs on /t/a"):
        respecified(world.group, again)
    assert not respecified(world.group, other).completed
    with pytest.raises(RefusedError, match="runs on /t/a"):
        respecified(respecified(world.group, other), again)


def until_pivoting(world: World, phase: Phase) -> None:
    for _ in range(600):
        epoch = world.ledger.newest_epoch("shop")
        if epoch is not None and epoch.spec.pivots and epoch.phase is phase:
            return
        world.now += 0.2
        world.cycle()
        world.mover(lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, lambda: False)
    pytest.fail("no pivot gets there")


def until_over(world: World, number: int) -> None:
    for _ in range(200):
        if number in world.decisions and (world.group.round is None or world.group.round.number != number):
            return
        world.now += 0.2
        world.cycle()
        world.mover(lambda: False)
    pytest.fail("it does not end")


def once() -> Callable[[], bool]:
    fates = iter([True])
    return lambda: next(fates, False)


def test_machines_of_two_groups_are_cut_one_after_the_other(world: World) -> None:
    other = Participant(vm="db", host="hv1", qmp="/db", disks=("vdc",))
    begun = GroupRecord(name="mail", spec=SPEC.model_copy(update={"members": (other,)}), requests=("a",))
    world.ledger.put_group(begun)
    world.ask()
    for _ in range(10):
        world.cycle()
        world.mover(lambda: False)
    cutting = [group.name for group in world.ledger.groups() if group.round and group.round.stage is Stage.CUTTING]
    waiting = [group.name for group in world.ledger.groups() if group.round and group.round.stage is Stage.STARTING]
    assert (len(cutting), len(waiting)) == (1, 1)


def test_a_machine_that_is_just_being_cut_is_its_groups_until_that_ends_whatever_a_new_spec_says(world: World) -> None:
    world.ask()
    while world.group.round is None or world.group.round.stage is not Stage.CUTTING:
        world.cycle()
        world.mover(lambda: False)
    put(world, spec=SPEC.model_copy(update={"members": MEMBERS[1:]}))
    other = SPEC.model_copy(update={"members": MEMBERS[:1]})
    elsewhere = SPEC.model_copy(update={"members": (MEMBERS[0].model_copy(update={"qmp": "/other"}),)})
    begun = Round(id="r", spec=other, begun_at=world.now, stage=Stage.STARTING, number=1)
    for name, spec in (("mail", other), ("chat", elsewhere)):
        world.ledger.put_group(GroupRecord(name=name, spec=spec, round=begun))
    world.cycle()
    assert [world.ledger.group(name).round for name in ("mail", "chat")] == [begun, begun]


def test_an_epoch_that_the_ledger_lost_ends_the_round(world: World) -> None:
    request = world.ask()
    while world.group.round is None or world.group.round.stage is not Stage.CUTTING:
        world.cycle()
        world.mover(lambda: False)
    world.now += 3
    lost = CountingLedger(lambda: world.now)
    lost.put_group(world.group.model_copy(update={"version": 0}))
    world.ledger = lost
    world.control = world.coordinator()
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert outcome.why == "the ledger has lost epoch 1"
    assert not world.decisions[1].is_point


def test_numbers_go_on_where_either_the_ledger_or_the_repository_has_counted_to(world: World) -> None:
    """And what another coordinator has begun, of which the group knows nothing, is given up first."""
    world.cycle()
    term = world.ledger.lead("another", 60_000)
    if term is None:
        world.now += 6
        term = world.ledger.lead("another", 60_000)
    assert term is not None
    world.ledger.adopt_run(term, 0)
    spec = EpochSpec(participants=MEMBERS, prepare_ms=10**9, freeze_ms=1000, hold_ms=1000)
    world.ledger.open_epoch(term, "shop", spec, 6)
    world.ledger.put_group(world.group.model_copy(update={"counted": 7}))
    world.ledger.resign(term)
    world.replace_coordinator()
    request = world.ask()
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert (outcome.published, outcome.number) == (True, 8)


def test_a_round_that_the_ledger_has_forgotten_to_be_over_finds_its_point(world: World) -> None:
    """The server has lost its last second: the epoch is retired, and the group seems to be cutting still."""
    request = world.ask()
    while world.group.round is None or world.group.round.stage is not Stage.CUTTING:
        world.cycle()
        world.mover(lambda: False)
    forgotten = world.group.round
    world.settle()
    assert world.group.published == 1
    put(world, round=forgotten, outcomes=(), published=0)
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert outcome.published
    world.check()


def test_what_was_copied_and_lost_is_not_published(world: World) -> None:
    request = world.ask()
    copying(world)
    assert world.group.round is not None
    put(world, round=world.group.round.model_copy(update={"stage": Stage.PUBLISHING}))
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert not outcome.published
    assert "is lost" in outcome.why
    world.check()


def events(world: World) -> list[str]:
    return [event["event"] for event in world.ledger.events(limit=1000) if event["job"] == ""]


def with_policy(world: World, **policy: Any) -> None:
    group = world.group
    changed = group.spec.policy.model_copy(update=policy)
    spec = group.spec.model_copy(update={"policy": changed})
    world.ledger.put_group(group.model_copy(update={"spec": spec}))


def test_points_follow_one_another_and_a_missed_objective_is_told_once(world: World) -> None:
    with_policy(world, rpo=30.0)
    world.settle()
    assert world.group.published == 1
    world.now += 40
    world.control._step_down()
    world.control = world.coordinator()
    world.cycle()
    world.cycle()
    assert world.group.rpo_missed
    assert world.group.round is not None
    world.settle()
    assert world.group.published == 2
    world.cycle()
    assert not world.group.rpo_missed
    assert events(world) == ["RPO_MISSED", "RPO_RECOVERED"]


def test_an_objective_that_is_given_up_while_it_is_missed_is_not_told_as_recovered(world: World) -> None:
    with_policy(world, rpo=30.0)
    put(world, published=1, published_cut_at=world.now - 40)
    world.cycle()
    assert world.group.rpo_missed
    with_policy(world, rpo=0.0)
    world.cycle()
    assert not world.group.rpo_missed
    assert events(world) == ["RPO_MISSED"]


def copying(world: World) -> None:
    while not (world.group.round and world.group.round.stage is Stage.COPYING and world.ledger.jobs()[0].spec.source):
        world.cycle()
        if not (world.group.round and world.group.round.stage is Stage.COPYING):
            world.mover(lambda: False)
        for one in MEMBERS:
            world.agent(one.vm, lambda: False)


def put(world: World, **changes: Any) -> None:
    world.ledger.put_group(world.group.model_copy(update=changes))


def test_all_copies_of_a_paused_group_rest_and_go_on_together(world: World) -> None:
    world.ask()
    copying(world)
    put(world, paused=True)
    world.cycle()
    copies = [job for job in world.ledger.jobs() if job.spec.part]
    assert {job.state for job in copies} == {State.PAUSED}
    assert not world.mover(lambda: False)
    put(world, paused=False)
    world.settle()
    assert world.group.published == 1


def test_a_paused_group_begins_no_round(world: World) -> None:
    with_policy(world, rpo=5.0)
    put(world, paused=True)
    world.now += 100
    world.cycle()
    assert world.group.round is None
    put(world, paused=False)
    world.cycle()
    assert world.group.round is not None


def test_the_limit_of_a_group_reaches_the_copies_that_are_at_work(world: World) -> None:
    world.ask()
    copying(world)
    with_policy(world, speed=12345)
    world.cycle()
    assert {job.speed for job in world.ledger.jobs() if job.spec.part} == {12345}


def test_of_rounds_that_fail_again_and_again_a_few_failed_jobs_are_kept_for_people_to_look_at(world: World) -> None:
    """Users' own jobs are not to be pushed out by them."""
    failed: list[str] = []
    for _ in range(FAILED_JOBS_KEPT + 2):
        world.ask()
        copying(world)
        assert world.mover(lambda: True)
        failed += [job.id for job in world.ledger.jobs() if job.fatal and job.id not in failed]
        world.settle()
    assert len(failed) == FAILED_JOBS_KEPT + 2
    assert {job.id for job in world.ledger.jobs()} == set(failed[-FAILED_JOBS_KEPT:])
    world.ask()
    world.settle()
    assert world.group.published
    assert len(world.ledger.jobs()) == FAILED_JOBS_KEPT


def until_pruning(world: World) -> None:
    while not world.group.prune_job:
        world.step()
        world.cycle()


def test_of_prunes_that_fail_again_and_again_a_few_are_kept(world: World) -> None:
    with_policy(world, retention=Retention(last=2))
    for _ in range(FAILED_JOBS_KEPT + 2):
        world.ask()
        world.now += 100
        until_pruning(world)
        assert world.mover(lambda: True)
        while world.group.prune_job:
            world.cycle()
    world.settle()
    assert len(world.prunes()) == len(world.ledger.jobs()) == FAILED_JOBS_KEPT


def test_a_round_that_its_user_cancels_leaves_no_point(world: World) -> None:
    request = world.ask()
    copying(world)
    assert world.group.round is not None
    put(world, cancelled=world.group.round.id)
    world.settle()
    outcome = world.group.outcome_for(request)
    assert outcome is not None
    assert (outcome.published, outcome.why) == (False, "cancelled by its user")
    assert not world.decisions[1].is_point


def test_points_that_no_rule_keeps_are_pruned_by_a_job(world: World) -> None:
    with_policy(world, retention=Retention(last=2))
    world.ask()
    until_pruning(world)
    (pruning,) = [job for job in world.ledger.jobs() if job.id.startswith("prune-")]
    task = pruning.spec.task
    assert isinstance(task, RepositoryTask)
    assert (task.kind, task.groups, task.retention.last) == (TaskKind.PRUNE, ("shop",), 2)
    assert world.mover(lambda: False)
    while world.group.prune_job:
        world.cycle()
    world.settle()
    assert world.ledger.jobs() == []


ACTIONS = st.sampled_from(["cycle", "cycle", "mover", "mover", "db", "web", "ask", "replace", "old", "time", "restart"])


@settings(max_examples=300)
@given(actions=st.lists(st.tuples(ACTIONS, st.integers(0, 9)), max_size=120), slice_=st.sampled_from([40, DISK_BYTES]))
def test_whatever_fails_a_point_is_whole_or_is_not_there(actions: list[tuple[str, int]], slice_: int) -> None:
    world = World()
    world.slice = slice_
    olds = [world.control]
    requests = [world.ask()]
    for name, luck in actions:
        fails = iter([luck == 0, luck == 1])

        def unlucky(fails: Any = fails) -> bool:
            return next(fails, False)

        match name:
            case "mover":
                world.mover(unlucky)
            case "db" | "web":
                world.agent(name, unlucky)
            case "ask":
                requests.append(world.ask())
            case "replace":
                world.replace_coordinator()
                olds.append(world.control)
            case "old":
                run_safely(olds[luck % len(olds)])
            case "time":
                world.now += luck
            case "restart":
                world.ledger.restart()
            case _:
                run_safely(world.control)
        world.check()
    world.replace_coordinator()
    world.settle()
    world.check()
    for request in requests[-10:]:
        assert world.group.outcome_for(request) is not None


def run_safely(control: ControlLoop) -> None:
    try:
        control.cycle()
    except (FlushpointError, UnavailableError):
        control._step_down()


def test_a_prune_that_outlasts_rounds_holds_none_of_them_up(world: World) -> None:
    with_policy(world, retention=Retention(last=2))
    world.ask()
    for _ in range(200):
        world.cycle()
        if world.prunes():
            break
        world.step()
    held = None
    for _ in range(20):
        world.cycle()
        held = held or world.ledger.claim("slow", secrets.token_hex(8), 10**9)
    assert held is not None
    assert held.job_id == world.group.prune_job
    for number in (2, 3):
        world.ask()
        for _ in range(200):
            if world.group.published == number and not world.group.round:
                break
            world.cycle()
            world.step()
        assert world.group.published == number
        assert world.prunes() == [held.job_id]


def test_the_age_of_a_point_is_told_by_our_clock_however_wrong_a_hosts_is(world: World) -> None:
    world.skew_s = 600.0
    world.ask()
    world.settle()
    with_policy(world, rpo=5.0)
    assert world.decisions[1].cut_at > world.now + 300, "its label tells what its hosts said"
    assert world.group.published_cut_at <= world.now
    world.now += 6
    world.cycle()
    world.cycle()
    assert world.group.round is not None
