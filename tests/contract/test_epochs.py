"""The contracts of an epoch's barrier (coordinator/ledger/barrier.py, and its part in contract.py), over each
implementation, and over both at once."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis import Redis

from coordinator.ledger import (
    GROUP_WAKE,
    Barrier,
    DeposedError,
    Ledger,
    MemoryBarrier,
    MemoryLedger,
    News,
    RedisBarrier,
    RedisLedger,
    Term,
    open_barrier,
)
from coordinator.ledger.redis_epochs import EPOCH_KEPT_MS
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
    Standing,
    ViewKind,
)
from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError, UsageError
from coordinator.model.group import GroupRecord, GroupSpec
from coordinator.model.job import JobSpec
from tests.contract.conftest import ValkeyServer

HOUR_MS = 3_600_000
SOON_MS = 250
"""A time that a test can wait for, and in which one arrival is made on a busy machine."""
WAIT_S = 30.0
"""For what comes at once."""
DB = Participant(vm="db", host="hv1", qmp="/run/db.qmp", disks=("vda", "vdb"))
WEB = Participant(vm="web", host="hv2", disks=("vda",))
GROUP = GroupSpec(repository="repo+file:///r", members=(DB,))
SPEC = EpochSpec(
    participants=(DB, WEB),
    prepare_ms=HOUR_MS,
    freeze_ms=HOUR_MS,
    hold_ms=HOUR_MS,
    repository="r",
    parents={"db/vda": 3},
)
BEFORE_GO = (Phase.PREPARING, Phase.FREEZING)
HURRIED = SPEC.model_copy(update={"prepare_ms": SOON_MS})
HURRIED_FREEZE = SPEC.model_copy(update={"freeze_ms": SOON_MS})
HURRIED_HOLD = SPEC.model_copy(update={"hold_ms": SOON_MS})


def facts(*disks: str) -> CutFacts:
    views = tuple(DiskView(disk=disk, kind=ViewKind.STAGE, why="an IOThread") for disk in disks)
    return CutFacts(cut_at=1.25, freeze_ms=7.5, filesystem_consistent=True, views=views)


def copies(*disks: str) -> ReadFacts:
    return ReadFacts(copies=tuple(DiskCopy(disk=d, path=f"/scratch/{d}.qcow2", size=1 << 30, since=3) for d in disks))


FACTS = {participant.vm: facts(*participant.disks) for participant in SPEC.participants}


COPIES = {participant.vm: copies(*participant.disks) for participant in SPEC.participants}


@dataclass
class Sides:
    """The coordinator's side of a ledger, and what makes the agents'."""

    ledger: Ledger
    make_barrier: Callable[[], RedisBarrier | MemoryBarrier]
    term: Term

    def open(self, spec: EpochSpec = SPEC, group: str = "shop") -> Epoch:
        return self.ledger.open_epoch(self.term, group, spec)

    def newest(self, group: str = "shop") -> Epoch:
        epoch = self.ledger.newest_epoch(group)
        assert epoch is not None
        return epoch

    def in_agent(self, story: Callable[[Barrier], Awaitable[None]]) -> None:
        async def run() -> None:
            async with aclosing(self.make_barrier()) as barrier:
                await story(barrier)

        asyncio.run(run())


def led(ledger: Ledger) -> Term:
    term = ledger.lead("leader", HOUR_MS)
    assert term is not None
    ledger.adopt_run(term, 0)
    return term


@pytest.fixture(params=["redis", "memory"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    if request.param == "memory":
        memory = MemoryLedger()
        yield Sides(memory, lambda: MemoryBarrier(memory), led(memory))
        return
    url, prefix = request.getfixturevalue("valkey_url"), f"{secrets.token_hex(4)}:"
    with closing(RedisLedger(url, prefix=prefix)) as ledger:
        yield Sides(ledger, lambda: open_barrier(url, prefix), led(ledger))


async def all_prepared(barrier: Barrier, epoch: Epoch) -> None:
    for vm in epoch.spec.vms:
        await barrier.prepared(epoch, vm)


async def all_frozen(barrier: Barrier, epoch: Epoch) -> None:
    await all_prepared(barrier, epoch)
    for vm in epoch.spec.vms:
        await barrier.frozen(epoch, vm)


async def all_cut(barrier: Barrier, epoch: Epoch) -> None:
    await all_frozen(barrier, epoch)
    for vm in epoch.spec.vms:
        await barrier.cut(epoch, vm, FACTS[vm])


async def all_readable(barrier: Barrier, epoch: Epoch) -> None:
    await all_cut(barrier, epoch)
    for vm in epoch.spec.vms:
        await barrier.readable(epoch, vm, COPIES[vm])


def shown(standing: Standing) -> tuple[Phase, GoKey]:
    return standing.phase, standing.key


async def timed_out(barrier: Barrier, epoch: Epoch, standing: Standing) -> Standing:
    """As an agent waits that hears nothing."""
    while standing.phase not in (Phase.ABORTED, Phase.RETIRED):
        await asyncio.sleep(standing.left_ms / 1000)
        standing = await barrier.time_out(epoch)
    return standing


def phases(news: list[News]) -> list[tuple[str, int, Phase]]:
    return [(one.group, one.number, one.standing.phase) for one in news]


# -- the walk of an epoch ---------------------------------------------------------------------------------------


def test_an_epoch_is_taken_when_all_were_cut_and_readable_when_all_can_be_read(sides: Sides) -> None:
    opened = sides.open()
    assert (opened.name, opened.spec, opened.phase, opened.key) == ("shop@1", SPEC, Phase.PREPARING, GoKey.OPEN)
    assert opened.prepare_by_ms == opened.opened_ms + HOUR_MS

    async def story(barrier: Barrier) -> None:
        epoch = await barrier.epoch("shop", 1)
        assert epoch == opened
        standing = await barrier.prepared(epoch, "db")
        assert (standing.phase, standing.key) == (Phase.PREPARING, GoKey.OPEN)
        assert 0 < standing.left_ms <= HOUR_MS
        standing = await barrier.prepared(epoch, "web")
        assert (standing.phase, standing.key) == (Phase.FREEZING, GoKey.OPEN)
        assert 0 < standing.left_ms <= HOUR_MS
        standing = await barrier.frozen(epoch, "web")
        assert (standing.phase, standing.key) == (Phase.FREEZING, GoKey.OPEN)
        assert shown(await barrier.frozen(epoch, "db")) == (Phase.CUTTING, GoKey.GO)
        assert shown(await barrier.cut(epoch, "db", FACTS["db"])) == (Phase.CUTTING, GoKey.GO)
        assert shown(await barrier.cut(epoch, "web", FACTS["web"])) == (Phase.TAKEN, GoKey.GO)
        assert shown(await barrier.readable(epoch, "web", COPIES["web"])) == (Phase.TAKEN, GoKey.GO)
        assert await barrier.readable(epoch, "db", COPIES["db"]) == Standing(phase=Phase.READABLE, key=GoKey.GO)

    sides.in_agent(story)
    taken = sides.newest()
    assert taken.phase is Phase.READABLE
    assert taken.prepared == taken.frozen == {"db", "web"}
    assert (taken.cuts, taken.reads) == (FACTS, COPIES)
    assert opened.opened_ms <= taken.go_ms < taken.freeze_by_ms
    assert taken.hold_by_ms == taken.go_ms + HOUR_MS
    retired = sides.ledger.retire_epoch(sides.term, "shop", 1)
    assert (retired.phase, retired.key, retired.cuts) == (Phase.RETIRED, GoKey.GO, FACTS)
    assert retired == sides.ledger.retire_epoch(sides.term, "shop", 1) == sides.newest()


def test_a_host_hears_of_every_phase_in_order(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        await all_readable(barrier, epoch)
        sides.ledger.retire_epoch(sides.term, "shop", 1)
        for host in ("hv1", "hv2"):
            news = await barrier.news(host, "0", 0)
            assert phases(news) == [
                ("shop", 1, phase) for phase in (*BEFORE_GO, Phase.CUTTING, Phase.TAKEN, Phase.READABLE, Phase.RETIRED)
            ]
            assert [one.standing.key for one in news] == [GoKey.OPEN] * 2 + [GoKey.GO] * 4
            left_ms = [one.standing.left_ms for one in news]
            assert left_ms[:3] == [HOUR_MS] * 3
            assert 0 < left_ms[3] <= HOUR_MS
            assert left_ms[4:] == [0, 0]
            assert await barrier.news(host, news[2].id, 0) == news[3:]
            assert await barrier.last_news(host) == news[-1].id
            assert await barrier.news(host, news[-1].id, 0.01) == []
        assert await barrier.news("hv3", "0", 0.01) == []
        assert await barrier.last_news("hv3") == "0-0"

    sides.in_agent(story)


def test_news_of_other_hosts_are_not_heard(sides: Sides) -> None:
    alone = SPEC.model_copy(update={"participants": (WEB,)})

    async def story(barrier: Barrier) -> None:
        before = await barrier.last_news("hv1")
        sides.open(alone)
        assert await barrier.news("hv1", before, 0) == []
        assert phases(await barrier.news("hv2", "0", 0)) == [("shop", 1, Phase.PREPARING)]

    sides.in_agent(story)


def test_who_waits_for_news_is_woken_by_them(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        after = await barrier.last_news("hv1")
        for arrives in (all_prepared, all_frozen):
            waiting = asyncio.create_task(barrier.news("hv1", after, WAIT_S))
            await asyncio.sleep(0)
            await barrier.time_out(epoch)  # it has begun to wait
            await arrives(barrier, epoch)
            news = await asyncio.wait_for(waiting, WAIT_S / 2)
            assert news
            after = news[-1].id
        assert shown(news[-1].standing) == (Phase.CUTTING, GoKey.GO)

    sides.in_agent(story)


def test_one_call_waits_for_all_epochs_of_a_host(sides: Sides) -> None:
    async def story(barrier: Barrier) -> None:
        waiting = asyncio.create_task(barrier.news("hv1", "0", WAIT_S))
        await barrier.epochs_on("hv1")
        sides.open(group="mail")
        first = await asyncio.wait_for(waiting, WAIT_S / 2)
        assert phases(first) == [("mail", 1, Phase.PREPARING)]
        sides.open()
        assert phases(await barrier.news("hv1", first[-1].id, WAIT_S)) == [("shop", 1, Phase.PREPARING)]
        assert [epoch.name for epoch in await barrier.epochs_on("hv1")] == ["mail@1", "shop@1"]

    sides.in_agent(story)


def test_a_wait_can_be_cancelled_and_disturbs_no_other_call(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        after = await barrier.last_news("hv1")
        waiting = asyncio.create_task(barrier.news("hv1", after, WAIT_S))
        assert (await barrier.prepared(epoch, "db")).phase is Phase.PREPARING
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await barrier.prepared(epoch, "web")
        assert phases(await barrier.news("hv1", after, WAIT_S)) == [("shop", 1, Phase.FREEZING)]

    sides.in_agent(story)


def test_a_position_that_is_none_is_a_mistake(sides: Sides) -> None:
    async def story(barrier: Barrier) -> None:
        with pytest.raises(UsageError, match="is no event id"):
            await barrier.news("hv1", "$", 0)

    sides.in_agent(story)


def test_the_leader_is_woken_when_an_epoch_is_taken_readable_or_aborted(sides: Sides) -> None:
    epoch = sides.open()
    assert sides.ledger.next_wake(0) is None

    async def to_the_cut(barrier: Barrier) -> None:
        await all_frozen(barrier, epoch)
        assert sides.ledger.next_wake(0) is None, "nothing for it to do yet"
        await all_cut(barrier, epoch)

    async def further(barrier: Barrier) -> None:
        await all_readable(barrier, epoch)

    sides.in_agent(to_the_cut)
    assert sides.ledger.next_wake(WAIT_S) == GROUP_WAKE + "shop"
    sides.in_agent(further)
    assert sides.ledger.next_wake(WAIT_S) == GROUP_WAKE + "shop"
    sides.ledger.give_up_epoch(sides.term, "shop", 1, "held too long")
    assert sides.ledger.next_wake(WAIT_S) == GROUP_WAKE + "shop"


# -- arrivals ---------------------------------------------------------------------------------------------------


def test_an_arrival_made_again_changes_nothing_and_answers_the_same(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        async def twice(arrive: Callable[[str], Awaitable[Standing]], vm: str) -> None:
            first = await arrive(vm)
            before = sides.newest()
            again = await arrive(vm)
            assert (again.phase, again.key, again.why) == (first.phase, first.key, first.why)
            assert sides.newest() == before

        for vm in ("db", "web"):
            await twice(lambda vm: barrier.prepared(epoch, vm), vm)
        for vm in ("db", "web"):
            await twice(lambda vm: barrier.frozen(epoch, vm), vm)
        for vm in ("db", "web"):
            await twice(lambda vm: barrier.cut(epoch, vm, FACTS[vm]), vm)
            other = FACTS[vm].model_copy(update={"freeze_ms": 99.0})
            await twice(lambda vm, other=other: barrier.cut(epoch, vm, other), vm)
        for vm in ("db", "web"):
            await twice(lambda vm: barrier.readable(epoch, vm, COPIES[vm]), vm)
        for vm in ("db", "web"):
            await twice(lambda vm: barrier.prepared(epoch, vm), vm)
            await twice(lambda vm: barrier.frozen(epoch, vm), vm)

    sides.in_agent(story)
    assert sides.newest().cuts == FACTS, "the first facts stay"


def test_one_who_arrives_often_does_not_stand_for_another(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        for _ in range(3):
            assert (await barrier.prepared(epoch, "db")).phase is Phase.PREPARING
        await barrier.prepared(epoch, "web")
        for _ in range(3):
            assert (await barrier.frozen(epoch, "db")).key is GoKey.OPEN
        await barrier.frozen(epoch, "web")
        for _ in range(3):
            assert (await barrier.cut(epoch, "db", FACTS["db"])).phase is Phase.CUTTING

    sides.in_agent(story)


def test_a_host_tells_of_all_that_stand_still_at_once(sides: Sides) -> None:
    """With one of them again, and in time or not."""
    many = tuple(Participant(vm=f"vm{n}", host=f"hv{n % 2}", disks=("vda",)) for n in range(4))
    epoch = sides.open(SPEC.model_copy(update={"participants": many}))

    async def story(barrier: Barrier) -> None:
        with pytest.raises(RefusedError, match="is frozen in epoch"):
            await barrier.frozen(epoch, "vm0", "vm2")
        for vm in epoch.spec.vms:
            await barrier.prepared(epoch, vm)
        with pytest.raises(NotFoundError, match="vm9"):
            await barrier.frozen(epoch, "vm0", "vm9")
        assert shown(await barrier.frozen(epoch, "vm0", "vm2")) == (Phase.FREEZING, GoKey.OPEN)
        assert shown(await barrier.frozen(epoch, "vm1", "vm0")) == (Phase.FREEZING, GoKey.OPEN)
        assert sides.newest().frozen == {"vm0", "vm1", "vm2"}
        assert shown(await barrier.frozen(epoch, "vm1", "vm3")) == (Phase.CUTTING, GoKey.GO)
        assert shown(await barrier.frozen(epoch, "vm0", "vm2")) == (Phase.CUTTING, GoKey.GO)
        heard = [phase for _, _, phase in phases(await barrier.news("hv1", "0", 0))]
        assert heard == [Phase.PREPARING, Phase.FREEZING, Phase.CUTTING]

    sides.in_agent(story)


def test_of_many_who_arrive_at_once_one_turns_the_key(sides: Sides) -> None:
    many = tuple(Participant(vm=f"vm{n}", host=f"hv{n % 3}", disks=("vda",)) for n in range(24))
    epoch = sides.open(SPEC.model_copy(update={"participants": many}))

    async def story(barrier: Barrier) -> None:
        await asyncio.gather(*(barrier.prepared(epoch, vm) for vm in epoch.spec.vms for _ in range(2)))
        answers = await asyncio.gather(*(barrier.frozen(epoch, vm) for vm in epoch.spec.vms))
        assert [shown(answer) for answer in answers].count((Phase.CUTTING, GoKey.GO)) == 1
        await asyncio.gather(*(barrier.cut(epoch, vm, facts("vda")) for vm in epoch.spec.vms))
        heard = [phase for _, _, phase in phases(await barrier.news("hv1", "0", 0))]
        assert heard == [Phase.PREPARING, Phase.FREEZING, Phase.CUTTING, Phase.TAKEN]

    sides.in_agent(story)


def test_nobody_freezes_or_cuts_without_being_told_to(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        with pytest.raises(RefusedError, match="db is frozen in epoch shop@1, which is preparing"):
            await barrier.frozen(epoch, "db")
        with pytest.raises(RefusedError, match="nobody was told to"):
            await barrier.cut(epoch, "db", FACTS["db"])
        await all_prepared(barrier, epoch)
        with pytest.raises(RefusedError, match="db is cut in epoch shop@1, which is freezing"):
            await barrier.cut(epoch, "db", FACTS["db"])
        with pytest.raises(RefusedError, match="db is readable in epoch shop@1, which is freezing"):
            await barrier.readable(epoch, "db", COPIES["db"])

    sides.in_agent(story)
    assert sides.newest().phase is Phase.FREEZING
    assert sides.newest().frozen == set(sides.newest().cuts) == set(sides.newest().reads) == set()


def test_a_stranger_and_a_cut_without_a_view_of_each_disk_are_mistakes(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        await all_frozen(barrier, epoch)
        with pytest.raises(NotFoundError, match="'mail' takes no part"):
            await barrier.prepared(epoch, "mail")
        with pytest.raises(NotFoundError, match="'mail' takes no part"):
            await barrier.fail_cut(epoch, "mail", "it ran")
        with pytest.raises(ValueError, match="vda, vdb"):
            await barrier.cut(epoch, "db", facts("vda"))
        with pytest.raises(ValueError, match="one copy of each of its disks: vda, vdb"):
            await barrier.readable(epoch, "db", copies("vda"))

    sides.in_agent(story)
    assert sides.newest().phase is Phase.CUTTING


def test_an_epoch_that_is_lost_is_not_found(sides: Sides) -> None:
    opened = sides.open()
    lost = opened.model_copy(update={"number": 9})

    async def story(barrier: Barrier) -> None:
        for step in (
            lambda: barrier.epoch("shop", 9),
            lambda: barrier.prepared(lost, "db"),
            lambda: barrier.frozen(lost, "db"),
            lambda: barrier.cut(lost, "db", FACTS["db"]),
            lambda: barrier.readable(lost, "db", COPIES["db"]),
            lambda: barrier.fail_cut(lost, "db", "it ran"),
            lambda: barrier.abort(lost, "db", "why"),
            lambda: barrier.time_out(lost),
        ):
            with pytest.raises(NotFoundError, match="there is no epoch shop@9"):
                await step()

    sides.in_agent(story)
    for end in (
        lambda: sides.ledger.give_up_epoch(sides.term, "shop", 9, "why"),
        lambda: sides.ledger.retire_epoch(sides.term, "shop", 9),
    ):
        with pytest.raises(NotFoundError, match="there is no epoch shop@9"):
            end()
    assert sides.ledger.newest_epoch("mail") is None


# -- time -------------------------------------------------------------------------------------------------------


def test_who_has_not_prepared_in_time_is_named(sides: Sides) -> None:
    epoch = sides.open(HURRIED)

    async def story(barrier: Barrier) -> None:
        await timed_out(barrier, epoch, await barrier.prepared(epoch, "db"))
        late = await barrier.prepared(epoch, "web")
        assert late == Standing(phase=Phase.ABORTED, key=GoKey.ABORT, why="not prepared in time: web")
        assert phases(await barrier.news("hv2", "0", 0))[-1] == ("shop", 1, Phase.ABORTED)

    sides.in_agent(story)
    assert sides.newest().over_ms >= epoch.prepare_by_ms


def test_all_who_are_missing_are_named_as_the_spec_has_them(sides: Sides) -> None:
    epoch = sides.open(HURRIED.model_copy(update={"participants": (WEB, DB)}))

    async def story(barrier: Barrier) -> None:
        standing = await timed_out(barrier, epoch, await barrier.time_out(epoch))
        assert standing.why == "not prepared in time: web, db"

    sides.in_agent(story)


def test_the_last_one_frozen_after_the_deadline_turns_the_key_to_abort(sides: Sides) -> None:
    epoch = sides.open(HURRIED_FREEZE)

    async def story(barrier: Barrier) -> None:
        await all_prepared(barrier, epoch)
        standing = await barrier.frozen(epoch, "web")
        while standing.left_ms:
            await asyncio.sleep(standing.left_ms / 1000)
            standing = await barrier.frozen(epoch, "web")
        assert standing.key is GoKey.OPEN, "an arrival made again changes nothing"
        late = await barrier.frozen(epoch, "db")
        assert late == Standing(phase=Phase.ABORTED, key=GoKey.ABORT, why="not frozen in time: db")

    sides.in_agent(story)


def test_a_time_out_says_abort_to_all_at_the_deadline(sides: Sides) -> None:
    epoch = sides.open(HURRIED_FREEZE)

    async def story(barrier: Barrier) -> None:
        await all_prepared(barrier, epoch)
        standing = await timed_out(barrier, epoch, await barrier.frozen(epoch, "db"))
        assert standing == Standing(phase=Phase.ABORTED, key=GoKey.ABORT, why="not frozen in time: web")
        assert await barrier.frozen(epoch, "web") == standing
        assert (await barrier.news("hv2", "0", 0))[-1].standing == standing

    sides.in_agent(story)
    assert sides.newest().over_ms >= sides.newest().freeze_by_ms


@pytest.mark.parametrize(
    ("arrive", "why"),
    [(all_frozen, "not cut in time: db, web"), (all_cut, "not readable in time: db, web")],
    ids=["frozen", "cut"],
)
def test_views_that_are_held_too_long_end_the_epoch_whoever_waits_for_it(
    sides: Sides, arrive: Callable[..., Awaitable[None]], why: str
) -> None:
    epoch = sides.open(HURRIED_HOLD)
    mail = sides.open(group="mail")

    async def story(barrier: Barrier) -> None:
        await arrive(barrier, epoch)
        ends_at = asyncio.get_running_loop().time() + WAIT_S
        while not (expired := sides.ledger.expire_epochs(sides.term)):
            assert asyncio.get_running_loop().time() < ends_at
            await asyncio.sleep(SOON_MS / 1000)
        assert expired == [(epoch.name, why)]
        assert sides.ledger.expire_epochs(sides.term) == []
        standing = Standing(phase=Phase.ABORTED, key=GoKey.GO, why=why)
        assert await barrier.readable(epoch, "db", COPIES["db"]) == standing
        assert (await barrier.news("hv1", "0", 0))[-1].standing == standing

    sides.in_agent(story)
    assert sides.newest("mail") == mail


def test_what_can_be_read_is_not_held_by_anybody(sides: Sides) -> None:
    epoch = sides.open(HURRIED_HOLD)

    async def story(barrier: Barrier) -> None:
        await all_readable(barrier, epoch)
        await asyncio.sleep(2 * SOON_MS / 1000)

    sides.in_agent(story)
    assert sides.ledger.expire_epochs(sides.term) == []
    assert sides.newest().phase is Phase.READABLE


def test_a_time_out_too_soon_changes_nothing(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        for arrive in (all_prepared, all_frozen, all_cut, all_readable):
            before = sides.newest()
            standing = await barrier.time_out(epoch)
            assert standing.phase is before.phase
            assert standing.left_ms > 0
            assert sides.newest() == before
            await arrive(barrier, epoch)

    sides.in_agent(story)


# -- aborts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrive", [None, all_prepared])
def test_a_participant_may_abort_before_go(sides: Sides, arrive: Callable[..., Awaitable[None]] | None) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        if arrive:
            await arrive(barrier, epoch)
        standing = await barrier.abort(epoch, "db", "no room for scratch")
        assert standing == Standing(phase=Phase.ABORTED, key=GoKey.ABORT, why="db: no room for scratch")
        assert await barrier.abort(epoch, "web", "late") == standing
        assert await barrier.prepared(epoch, "web") == standing
        assert await barrier.frozen(epoch, "web") == standing
        assert await barrier.cut(epoch, "web", FACTS["web"]) == standing
        assert await barrier.fail_cut(epoch, "web", "it ran") == standing
        assert await barrier.epochs_on("hv1") == []

    sides.in_agent(story)


@pytest.mark.parametrize("arrive", [all_frozen, all_cut, all_readable])
def test_an_abort_after_go_changes_nothing(sides: Sides, arrive: Callable[..., Awaitable[None]]) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        await arrive(barrier, epoch)
        before = sides.newest()
        assert (await barrier.abort(epoch, "db", "too slow")).key is GoKey.GO
        assert sides.newest() == before

    sides.in_agent(story)


def test_a_failed_cut_ends_the_epoch_and_leaves_the_key(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        with pytest.raises(RefusedError, match="nobody was told to"):
            await barrier.fail_cut(epoch, "db", "it ran")
        await all_frozen(barrier, epoch)
        await barrier.cut(epoch, "db", FACTS["db"])
        standing = await barrier.fail_cut(epoch, "web", "it ran")
        assert standing == Standing(phase=Phase.ABORTED, key=GoKey.GO, why="web: it ran")
        assert await barrier.cut(epoch, "web", FACTS["web"]) == standing
        assert (await barrier.news("hv1", "0", 0))[-1].standing == standing

    sides.in_agent(story)
    with pytest.raises(RefusedError, match="only one that can be read"):
        sides.ledger.retire_epoch(sides.term, "shop", 1)


def test_a_view_that_breaks_before_all_can_be_read_ends_the_epoch(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        await all_cut(barrier, epoch)
        await barrier.readable(epoch, "db", COPIES["db"])
        standing = await barrier.fail_cut(epoch, "web", "no room for scratch")
        assert standing == Standing(phase=Phase.ABORTED, key=GoKey.GO, why="web: no room for scratch")
        assert await barrier.readable(epoch, "web", COPIES["web"]) == standing

    sides.in_agent(story)
    assert sides.newest().reads == {"db": COPIES["db"]}


def test_once_all_can_be_read_the_coordinator_decides(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        await all_readable(barrier, epoch)
        with pytest.raises(RefusedError, match="epoch shop@1 is readable"):
            await barrier.fail_cut(epoch, "db", "no room for scratch")

    sides.in_agent(story)
    given_up = sides.ledger.give_up_epoch(sides.term, "shop", 1, "held too long")
    assert (given_up.phase, given_up.key, given_up.why) == (Phase.ABORTED, GoKey.GO, "held too long")
    assert sides.ledger.give_up_epoch(sides.term, "shop", 1, "once more") == given_up


def test_given_up_before_go_it_says_abort(sides: Sides) -> None:
    epoch = sides.open()
    given_up = sides.ledger.give_up_epoch(sides.term, "shop", 1, "an operator's wish")
    assert (given_up.phase, given_up.key) == (Phase.ABORTED, GoKey.ABORT)

    async def story(barrier: Barrier) -> None:
        standing = await barrier.prepared(epoch, "db")
        assert standing == Standing(phase=Phase.ABORTED, key=GoKey.ABORT, why="an operator's wish")

    sides.in_agent(story)


# -- numbers and terms ------------------------------------------------------------------------------------------


def test_a_group_has_one_epoch_at_a_time_and_numbers_only_grow(sides: Sides) -> None:
    sides.open()
    with pytest.raises(RefusedError, match="epoch shop@1 is preparing"):
        sides.open()
    sides.ledger.give_up_epoch(sides.term, "shop", 1, "why")
    assert sides.ledger.open_epoch(sides.term, "shop", SPEC, after=6).number == 7
    sides.ledger.give_up_epoch(sides.term, "shop", 7, "why")
    assert sides.ledger.open_epoch(sides.term, "shop", SPEC, after=2).number == 8
    assert sides.open(group="mail").number == 1
    assert sides.newest().number == 8


def test_the_next_epoch_is_opened_when_one_is_retired_and_not_while_it_is_read(sides: Sides) -> None:
    epoch = sides.open()

    async def story(barrier: Barrier) -> None:
        await all_readable(barrier, epoch)

    sides.in_agent(story)
    with pytest.raises(RefusedError, match="epoch shop@1 is readable"):
        sides.open()
    sides.ledger.retire_epoch(sides.term, "shop", 1)
    assert sides.open().number == 2


def test_arrivals_of_an_old_epoch_do_not_count_in_the_next(sides: Sides) -> None:
    old = sides.open()
    sides.ledger.give_up_epoch(sides.term, "shop", 1, "why")
    sides.open()

    async def story(barrier: Barrier) -> None:
        await all_prepared(barrier, old)

    sides.in_agent(story)
    assert sides.newest().prepared == set()


def test_a_coordinator_that_was_deposed_changes_nothing(sides: Sides) -> None:
    sides.open()
    old, sides.term = sides.term, sides.ledger.lead("leader", HOUR_MS, at_least=7) or sides.term
    for step in (
        lambda: sides.ledger.open_epoch(old, "mail", SPEC),
        lambda: sides.ledger.give_up_epoch(old, "shop", 1, "why"),
        lambda: sides.ledger.expire_epochs(old),
        lambda: sides.ledger.retire_epoch(old, "shop", 1),
    ):
        with pytest.raises(DeposedError):
            step()
    assert sides.newest().phase is Phase.PREPARING
    assert sides.ledger.newest_epoch("mail") is None


def test_a_group_without_a_name_is_refused(sides: Sides) -> None:
    with pytest.raises(UsageError, match="no name of a group"):
        sides.open(group="sh@op")


def test_after_a_restart_no_epoch_is_opened_before_recovery(
    restartable: tuple[Ledger, Callable[[], None]],
) -> None:
    ledger, restart = restartable
    term = led(ledger)
    ledger.open_epoch(term, "shop", SPEC)
    restart()
    with pytest.raises(DeposedError, match="was restarted"):
        ledger.open_epoch(term, "mail", SPEC)
    epoch = ledger.newest_epoch("shop")
    assert epoch is not None
    assert epoch.phase is Phase.PREPARING
    ledger.adopt_run(term, 0)
    assert ledger.open_epoch(term, "mail", SPEC).number == 1


def test_an_epoch_that_another_run_of_the_server_aborts_may_have_had_its_go(
    restartable: tuple[Ledger, Callable[[], None]],
) -> None:
    """The run that opened it may have lost that with its last second."""
    ledger, restart = restartable
    term = led(ledger)
    ledger.open_epoch(term, "shop", SPEC)
    ledger.open_epoch(term, "mail", SPEC)
    assert not ledger.give_up_epoch(term, "mail", 1, "why").doubtful
    restart()
    ledger.adopt_run(term, 0)
    assert not ledger.give_up_epoch(term, "mail", 1, "again").doubtful
    aborted = ledger.give_up_epoch(term, "shop", 1, "why")
    assert (aborted.key, aborted.doubtful) == (GoKey.ABORT, True)
    assert ledger.newest_epoch("shop") == aborted
    ledger.open_epoch(term, "shop", SPEC)
    assert not ledger.give_up_epoch(term, "shop", 2, "why").doubtful


def test_a_leader_decides_nothing_by_what_it_read_before_a_restart(
    restartable: tuple[Ledger, Callable[[], None]],
) -> None:
    """The server may have lost what was read, and its term may be all that is left."""
    ledger, restart = restartable
    term = led(ledger)
    ledger.open_epoch(term, "shop", SPEC)
    spec = JobSpec(source="/a", target="/b")
    ledger.submit("job1", spec)
    group = ledger.put_group(GroupRecord(name="shop", spec=GROUP))
    restart()
    steps: list[Callable[[], object]] = [
        lambda: ledger.submit("job2", spec, term=term),
        lambda: ledger.update("job1", ledger.job("job1").version, {"speed": 1}, term=term),
        lambda: ledger.put_group(group, term=term),
        lambda: ledger.give_up_epoch(term, "shop", 1, "why"),
        lambda: ledger.expire_epochs(term),
        lambda: ledger.reap(term, 1),
    ]
    for step in steps:
        with pytest.raises(DeposedError):
            step()
    ledger.adopt_run(term, 0)
    for step in steps:
        step()


# -- in Redis alone ---------------------------------------------------------------------------------------------


def test_an_epoch_that_is_over_leaves_nothing_but_its_number(valkey_url: str) -> None:
    prefix = f"{secrets.token_hex(4)}:"
    with (
        closing(RedisLedger(valkey_url, prefix=prefix)) as ledger,
        closing(Redis.from_url(valkey_url, decode_responses=True)) as server,
    ):
        sides = Sides(ledger, lambda: open_barrier(valkey_url, prefix), led(ledger))
        epoch = sides.open()

        def kept() -> dict[str, float]:
            """Keys of epochs by the time until they are gone, in ms."""
            names: Any = server.scan_iter(f"{prefix}epoch*", count=1000)
            return {name.removeprefix(prefix): float(str(server.pttl(name))) for name in names}

        async def story(barrier: Barrier) -> None:
            await all_readable(barrier, epoch)

        sides.in_agent(story)
        news = {"epoch_news:hv1", "epoch_news:hv2"}
        arrivals = ("prepared", "frozen", "cut", "readable")
        records = {f"{part}:shop@1" for part in ("epoch", "epoch_vms", *(f"epoch_{name}" for name in arrivals))}
        for_ever = {name for name, left_ms in kept().items() if left_ms < 0}
        assert for_ever == records | {"epoch_numbers", "epochs_open", "epochs_on:hv1", "epochs_on:hv2"}
        ledger.retire_epoch(sides.term, "shop", 1)
        assert kept().keys() == records | news | {"epoch_numbers"}
        assert all(0 < left_ms <= EPOCH_KEPT_MS for name, left_ms in kept().items() if name != "epoch_numbers")


def test_a_server_that_is_away_is_unavailable(own_valkey: ValkeyServer) -> None:
    with closing(RedisLedger(own_valkey.url)) as ledger:
        sides = Sides(ledger, lambda: open_barrier(own_valkey.url), led(ledger))
        epoch = sides.open()

        async def story(barrier: Barrier) -> None:
            await barrier.prepared(epoch, "db")
            waiting = asyncio.create_task(barrier.news("hv1", await barrier.last_news("hv1"), WAIT_S))
            await barrier.time_out(epoch)  # it has begun to wait
            own_valkey.kill()
            for step in (waiting, barrier.prepared(epoch, "web"), barrier.news("hv1", "0", 1)):
                with pytest.raises(UnavailableError, match=r"valkey\.sock"):
                    await step
            own_valkey.start()
            assert (await barrier.prepared(epoch, "web")).phase is Phase.FREEZING, "the epoch is where it was"

        sides.in_agent(story)


# -- both at once -----------------------------------------------------------------------------------------------


class Twins(RuleBasedStateMachine):
    """The same random steps over both; no time runs out."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        prefix = f"{secrets.token_hex(4)}:"
        redis, memory = RedisLedger(self.url, prefix=prefix), MemoryLedger()
        self.ledgers: tuple[Ledger, Ledger] = (redis, memory)
        self.barriers: tuple[Barrier, Barrier] = (open_barrier(self.url, prefix), MemoryBarrier(memory))
        self.term = led(redis)
        assert led(memory) == self.term
        self.epoch = self.both(lambda ledger: ledger.open_epoch(self.term, "shop", SPEC))
        self.known = [self.epoch]

    def teardown(self) -> None:
        for barrier in self.barriers:
            self.loop.run_until_complete(barrier.aclose())
        for ledger in self.ledgers:
            ledger.close()
        self.loop.close()

    def both(self, step: Callable[[Ledger], Any]) -> Any:
        return self.same([self.answer(lambda ledger=ledger: step(ledger)) for ledger in self.ledgers])

    def agents(self, step: Callable[[Barrier], Any]) -> Any:
        return self.same(
            [
                self.answer(lambda barrier=barrier: self.loop.run_until_complete(step(barrier)))
                for barrier in self.barriers
            ]
        )

    def answer(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except FlushpointError as error:
            return type(error), str(error)

    def same(self, answers: list[Any]) -> Any:
        assert _observable(answers[0]) == _observable(answers[1])
        return answers[1]

    @rule(after=st.sampled_from([0, 0, 5]))
    def open(self, after: int) -> None:
        opened = self.both(lambda ledger: ledger.open_epoch(self.term, "shop", SPEC, after))
        if isinstance(opened, Epoch):
            self.epoch = opened
            self.known.append(opened)

    @rule(vm=st.sampled_from(["db", "web"]))
    def prepared(self, vm: str) -> None:
        self.agents(lambda barrier: barrier.prepared(self.epoch, vm))

    @rule(vm=st.sampled_from(["db", "web"]))
    def frozen(self, vm: str) -> None:
        self.agents(lambda barrier: barrier.frozen(self.epoch, vm))

    @rule(vm=st.sampled_from(["db", "web"]))
    def cut(self, vm: str) -> None:
        self.agents(lambda barrier: barrier.cut(self.epoch, vm, FACTS[vm]))

    @rule(vm=st.sampled_from(["db", "web"]))
    def readable(self, vm: str) -> None:
        self.agents(lambda barrier: barrier.readable(self.epoch, vm, COPIES[vm]))

    @rule(arrive=st.sampled_from([all_prepared, all_frozen, all_cut, all_readable]))
    def all(self, arrive: Callable[[Barrier, Epoch], Awaitable[None]]) -> None:
        self.agents(lambda barrier: arrive(barrier, self.epoch))

    @rule(vm=st.sampled_from(["db", "web"]))
    def fail_cut(self, vm: str) -> None:
        self.agents(lambda barrier: barrier.fail_cut(self.epoch, vm, "it ran"))

    @rule(vm=st.sampled_from(["db", "web"]))
    def abort(self, vm: str) -> None:
        self.agents(lambda barrier: barrier.abort(self.epoch, vm, "no room"))

    @rule()
    def time_out(self) -> None:
        self.agents(lambda barrier: barrier.time_out(self.epoch))

    @rule()
    def expire(self) -> None:
        self.both(lambda ledger: ledger.expire_epochs(self.term))

    @rule(off=st.sampled_from([0, 0, 0, -1]))
    def retire(self, off: int) -> None:
        self.both(lambda ledger: ledger.retire_epoch(self.term, "shop", self.epoch.number + off))

    @rule(fenced=st.booleans())
    def give_up(self, fenced: bool) -> None:
        term = self.term if fenced else Term(0, "nobody")
        self.both(lambda ledger: ledger.give_up_epoch(term, "shop", self.epoch.number, "why"))

    @rule(which=st.integers(0, 9))
    def look_back(self, which: int) -> None:
        self.epoch = self.known[which % len(self.known)]

    @invariant()
    def look_the_same(self) -> None:
        self.both(lambda ledger: ledger.newest_epoch("shop"))
        self.both(lambda ledger: ledger.next_wake(0))
        self.agents(lambda barrier: barrier.epoch("shop", self.epoch.number))
        for host in ("hv1", "hv2"):
            self.agents(lambda barrier, host=host: barrier.epochs_on(host))
            self.agents(lambda barrier, host=host: barrier.news(host, "0", 0))


def _observable(answer: Any) -> Any:
    """Without ids and times that come from a clock."""
    if isinstance(answer, list):
        return [_observable(item) for item in answer]
    if isinstance(answer, News):
        return answer.group, answer.number, _observable(answer.standing)
    if isinstance(answer, Standing):
        return answer.model_copy(update={"left_ms": min(answer.left_ms, 1)})
    if isinstance(answer, Epoch):
        timed = ("opened_ms", "prepare_by_ms", "freeze_by_ms", "go_ms", "hold_by_ms", "over_ms")
        return answer.model_copy(update={name: min(getattr(answer, name), 1) for name in timed})
    return answer


def test_both_answer_the_same(valkey_url: str) -> None:
    Twins.url = valkey_url
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Twins,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
