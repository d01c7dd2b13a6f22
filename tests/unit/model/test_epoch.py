"""The barrier of an epoch as rules, for arrivals in any order, at any time and as often as may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from coordinator.model.epoch import (
    OVER,
    TRANSITIONS,
    Arrival,
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
    abort,
    arrive,
    checked_facts,
    checked_reads,
    fail_cut,
    give_up,
    is_early,
    open_epoch,
    retire,
    time_out,
    transition_is_legal,
)
from coordinator.model.errors import NotFoundError, RefusedError, UsageError

PREPARE_MS = 500
FREEZE_MS = 100
HOLD_MS = 10_000
FACTS = CutFacts(
    cut_at=1.5, freeze_ms=7.0, filesystem_consistent=False, views=(DiskView(disk="vda", kind=ViewKind.STAGE),)
)
COPIES = ReadFacts(copies=(DiskCopy(disk="vda", path="/scratch/vda.qcow2", size=1 << 30, since=6),))
DB = Participant(vm="db", host="hv1", disks=("vda",))
WEB = Participant(vm="web", host="hv2", disks=("vda",))


def opened(*participants: Participant) -> Epoch:
    times = {"prepare_ms": PREPARE_MS, "freeze_ms": FREEZE_MS, "hold_ms": HOLD_MS}
    spec = EpochSpec(participants=participants or (DB, WEB), **times)
    return open_epoch("shop", 7, spec, 0)


def all_arrive(epoch: Epoch, arrival: Arrival, now_ms: int) -> Epoch:
    for vm in epoch.spec.vms:
        epoch = arrive(epoch, vm, arrival, now_ms, facts_of(arrival))
    return epoch


def facts_of(arrival: Arrival) -> CutFacts | ReadFacts | None:
    return {Arrival.CUT: FACTS, Arrival.READABLE: COPIES}.get(arrival)


def freezing() -> Epoch:
    return all_arrive(opened(), Arrival.PREPARED, 10)


def cutting() -> Epoch:
    return all_arrive(freezing(), Arrival.FROZEN, 20)


def taken() -> Epoch:
    return all_arrive(cutting(), Arrival.CUT, 30)


def readable() -> Epoch:
    return all_arrive(taken(), Arrival.READABLE, 35)


def test_an_epoch_is_taken_when_all_have_prepared_frozen_and_cut_and_retired_when_it_was_read() -> None:
    epoch = freezing()
    assert (epoch.phase, epoch.key, epoch.freeze_by_ms) == (Phase.FREEZING, GoKey.OPEN, 10 + FREEZE_MS)
    epoch = all_arrive(epoch, Arrival.FROZEN, 20)
    assert (epoch.phase, epoch.key, epoch.go_ms) == (Phase.CUTTING, GoKey.GO, 20)
    epoch = all_arrive(epoch, Arrival.CUT, 30)
    assert (epoch.phase, epoch.key, dict(epoch.cuts)) == (Phase.TAKEN, GoKey.GO, {"db": FACTS, "web": FACTS})
    epoch = all_arrive(epoch, Arrival.READABLE, 35)
    assert (epoch.phase, epoch.key, dict(epoch.reads)) == (Phase.READABLE, GoKey.GO, {"db": COPIES, "web": COPIES})
    assert retire(epoch, 40).phase is Phase.RETIRED


def test_who_is_missing_when_the_time_is_over_is_named() -> None:
    late = time_out(arrive(opened(), "web", Arrival.PREPARED, 1), PREPARE_MS)
    assert (late.phase, late.key, late.why) == (Phase.ABORTED, GoKey.ABORT, "not prepared in time: db")
    late = time_out(arrive(freezing(), "db", Arrival.FROZEN, 20), 10 + FREEZE_MS)
    assert (late.phase, late.key, late.why) == (Phase.ABORTED, GoKey.ABORT, "not frozen in time: web")


def test_the_last_arrival_at_the_deadline_is_too_late() -> None:
    one_left = arrive(freezing(), "db", Arrival.FROZEN, 20)
    assert arrive(one_left, "web", Arrival.FROZEN, 10 + FREEZE_MS - 1).key is GoKey.GO
    assert arrive(one_left, "web", Arrival.FROZEN, 10 + FREEZE_MS).key is GoKey.ABORT


def test_a_time_out_that_comes_too_soon_changes_nothing_and_says_how_long_to_wait() -> None:
    assert time_out(opened(), PREPARE_MS - 1) == opened()
    assert opened().standing(PREPARE_MS - 1).left_ms == 1
    assert freezing().standing(10).left_ms == FREEZE_MS
    assert cutting().standing(20).left_ms == HOLD_MS
    assert readable().standing(20).left_ms == 0
    assert time_out(taken(), 20 + HOLD_MS - 1) == taken()


def test_a_view_is_not_held_for_longer_than_was_said() -> None:
    late = time_out(arrive(cutting(), "db", Arrival.CUT, 30, FACTS), 20 + HOLD_MS)
    assert (late.phase, late.key, late.why) == (Phase.ABORTED, GoKey.GO, "not cut in time: web")
    late = arrive(taken(), "db", Arrival.READABLE, 20 + HOLD_MS, COPIES)
    assert (late.phase, late.key, late.why) == (Phase.ABORTED, GoKey.GO, "not readable in time: db, web")
    assert time_out(readable(), 10**9) == readable(), "nobody holds anything any more"


@pytest.mark.parametrize("phase", [opened, freezing])
def test_a_participant_may_abort_before_go(phase: Callable[[], Epoch]) -> None:
    ended = abort(phase(), "db", "no room for scratch", 25)
    assert (ended.phase, ended.key, ended.why, ended.over_ms) == (
        Phase.ABORTED,
        GoKey.ABORT,
        "db: no room for scratch",
        25,
    )


@pytest.mark.parametrize("phase", [cutting, taken, readable])
def test_an_abort_after_go_changes_nothing(phase: Callable[[], Epoch]) -> None:
    assert abort(phase(), "db", "too slow", 25) == phase()


def test_a_failed_cut_aborts_the_epoch_and_never_takes_go_back() -> None:
    cut_by_one = arrive(cutting(), "db", Arrival.CUT, 25, FACTS)
    for vm in ("db", "web"):
        ended = fail_cut(cut_by_one, vm, "it ran", 26)
        assert (ended.phase, ended.key, ended.why) == (Phase.ABORTED, GoKey.GO, f"{vm}: it ran")
        assert arrive(ended, "web", Arrival.CUT, 27, FACTS) == ended


def test_a_view_that_breaks_before_all_can_be_read_aborts_the_epoch() -> None:
    read_of_one = arrive(taken(), "db", Arrival.READABLE, 35, COPIES)
    for vm in ("db", "web"):
        ended = fail_cut(read_of_one, vm, "no room for scratch", 36)
        assert (ended.phase, ended.key, ended.why) == (Phase.ABORTED, GoKey.GO, f"{vm}: no room for scratch")
        assert arrive(ended, "web", Arrival.READABLE, 37, COPIES) == ended


def test_a_cut_cannot_fail_before_go_or_after_all_can_be_read() -> None:
    for phase in (opened, freezing):
        with pytest.raises(RefusedError, match="nobody was told to"):
            fail_cut(phase(), "db", "it ran", 25)
    for epoch in (readable(), retire(readable(), 40)):
        with pytest.raises(RefusedError, match="all can be read"):
            fail_cut(epoch, "db", "no room for scratch", 41)
    ended = give_up(readable(), "held too long", 41)
    assert fail_cut(ended, "db", "no room for scratch", 42) == ended


def test_the_coordinator_may_give_up_until_the_epoch_is_over() -> None:
    before_go, after_go = (opened, freezing), (cutting, taken, readable)
    for phase in (*before_go, *after_go):
        ended = give_up(phase(), "held too long", 50)
        assert (ended.phase, ended.why) == (Phase.ABORTED, "held too long")
        assert ended.key is (GoKey.ABORT if phase in before_go else GoKey.GO)
        assert give_up(ended, "once more", 51) == ended
    published = retire(readable(), 40)
    assert give_up(published, "held too long", 50) == published


def test_only_what_can_be_read_is_retired() -> None:
    for phase in (opened, freezing, cutting, taken, lambda: give_up(readable(), "held too long", 36)):
        with pytest.raises(RefusedError, match="only one that can be read"):
            retire(phase(), 40)
    assert retire(retire(readable(), 40), 50) == retire(readable(), 40)


def test_nobody_freezes_or_cuts_without_being_told_to() -> None:
    early = [(opened(), Arrival.FROZEN), (opened(), Arrival.CUT), (freezing(), Arrival.CUT)]
    for epoch, arrival in (*early, (cutting(), Arrival.READABLE)):
        with pytest.raises(RefusedError, match="nobody was told to"):
            arrive(epoch, "db", arrival, 20, facts_of(arrival))


def test_a_stranger_does_not_arrive() -> None:
    for step in (
        lambda: arrive(opened(), "mail", Arrival.PREPARED, 1),
        lambda: abort(opened(), "mail", "why", 1),
        lambda: fail_cut(cutting(), "mail", "why", 1),
    ):
        with pytest.raises(NotFoundError, match="'mail' takes no part in epoch shop@7"):
            step()


def test_a_cut_has_facts_and_a_view_of_each_disk() -> None:
    with pytest.raises(ValueError, match="facts"):
        arrive(cutting(), "db", Arrival.CUT, 25)
    two = opened(Participant(vm="db", host="hv1", disks=("vda", "vdb")))
    with pytest.raises(ValueError, match="vda, vdb"):
        checked_facts(two, "db", FACTS)
    assert checked_facts(opened(), "db", FACTS) is FACTS


def test_what_is_readable_has_a_copy_of_each_disk() -> None:
    with pytest.raises(ValueError, match="facts"):
        arrive(taken(), "db", Arrival.READABLE, 35, FACTS)
    two = opened(Participant(vm="db", host="hv1", disks=("vda", "vdb")))
    with pytest.raises(ValueError, match="one copy of each of its disks: vda, vdb"):
        checked_reads(two, "db", COPIES)
    assert checked_reads(opened(), "db", COPIES) is COPIES


@pytest.mark.parametrize(
    "participants",
    [
        (),
        (DB, DB),
        ({"vm": "db", "host": "hv1", "disks": ()},),
        ({"vm": "db", "host": "hv1", "disks": ("vda", "vda")},),
        ({"vm": "d\nb", "host": "hv1", "disks": ("vda",)},),
        ({"vm": "db", "host": "hv:1", "disks": ("vda",)},),
    ],
)
def test_a_spec_that_nobody_could_arrive_for_is_refused(participants: object) -> None:
    with pytest.raises(ValidationError):
        EpochSpec.model_validate({"participants": participants, "prepare_ms": 1, "freeze_ms": 1})


def test_a_group_has_a_name() -> None:
    with pytest.raises(UsageError, match="no name of a group"):
        open_epoch("sh:op", 1, opened().spec, 0)


def test_each_host_is_named_once_and_finds_its_machines() -> None:
    other = Participant(vm="mail", host="hv1", disks=("sda",))
    epoch = opened(DB, WEB, other)
    assert epoch.spec.hosts == ("hv1", "hv2")
    assert epoch.on("hv1") == (DB, other)
    assert epoch.on("hv3") == ()


def test_every_phase_leads_to_an_end_and_none_leads_back() -> None:
    assert {Phase.RETIRED, Phase.ABORTED} == OVER
    for old, following in TRANSITIONS.items():
        assert old in OVER or Phase.ABORTED in following
        assert not any(transition_is_legal(new, old) for new in following)
    assert not is_early(Arrival.PREPARED, Phase.PREPARING)
    assert is_early(Arrival.CUT, Phase.PREPARING)
    assert not any(is_early(arrival, phase) for arrival in Arrival for phase in OVER | {Phase.READABLE})


@dataclass
class History:
    """What has been asked for, written down apart from the model: the moments of all calls that were not refused."""

    epoch: Epoch
    now_ms: int = 0
    calls: dict[tuple[str, Arrival], list[int]] = field(default_factory=dict)
    keys: set[GoKey] = field(default_factory=set)

    def call(self, vm: str, what: Arrival | str) -> None:
        before = self.epoch
        try:
            self.epoch = self._stepped(vm, what)
        except RefusedError:
            return
        finally:
            self.keys.add(self.epoch.key)
        if isinstance(what, Arrival):
            self.calls.setdefault((vm, what), []).append(self.now_ms)
        assert before.phase is self.epoch.phase or transition_is_legal(before.phase, self.epoch.phase)
        assert not before.is_over or self.epoch == before

    def _stepped(self, vm: str, what: Arrival | str) -> Epoch:
        if isinstance(what, Arrival):
            return arrive(self.epoch, vm, what, self.now_ms, facts_of(what))
        if what == "abort":
            return abort(self.epoch, vm, "why", self.now_ms)
        if what == "fail_cut":
            return fail_cut(self.epoch, vm, "why", self.now_ms)
        if what == "give_up":
            return give_up(self.epoch, "why", self.now_ms)
        return retire(self.epoch, self.now_ms) if what == "retire" else time_out(self.epoch, self.now_ms)

    def came(self, arrival: Arrival, after_ms: int, before_ms: int) -> bool:
        """Whether all did, at one time or another in between."""
        return all(
            any(after_ms <= at < before_ms for at in self.calls.get((vm, arrival), [])) for vm in self.epoch.spec.vms
        )


_ARRIVALS = st.sampled_from([*Arrival] * 4)
_OTHERS = st.sampled_from(["time_out", "time_out", "abort", "fail_cut", "give_up", "retire"])
_CALLS = st.one_of(_ARRIVALS, _ARRIVALS, _ARRIVALS, _OTHERS)
_STEPS = st.lists(st.tuples(st.sampled_from("abc"), _CALLS, st.sampled_from([0, 0, 1, 5, 60])), max_size=60)


def lived(vms: int, steps: list[tuple[str, Arrival | str, int]]) -> History:
    """Half of the histories begin as they should, so that the other half of an epoch is seen as well."""
    named = [Participant(vm=name, host="hv1", disks=("vda",)) for name in "abc"[:vms]]
    history = History(opened(*named))
    for vm, what, later_ms in steps:
        history.now_ms += later_ms
        if vm in history.epoch.spec.vms:
            history.call(vm, what)
    return history


def in_order(vms: int, length: int) -> list[tuple[str, Arrival | str, int]]:
    return [(vm, arrival, 1) for arrival in Arrival for vm in "abc"[:vms]][:length]


@given(st.integers(1, 3), st.integers(0, 12), _STEPS)
def test_the_key_is_never_both_and_says_go_only_if_all_came_in_time(
    vms: int, ordered: int, steps: list[tuple[str, Arrival | str, int]]
) -> None:
    history = lived(vms, in_order(vms, ordered) + steps)
    epoch = history.epoch
    assert not {GoKey.GO, GoKey.ABORT} <= history.keys
    assert (epoch.key is GoKey.GO) == (epoch.go_ms > 0)
    if epoch.key is GoKey.GO:
        assert history.came(Arrival.PREPARED, 0, PREPARE_MS)
        all_prepared_ms = epoch.freeze_by_ms - FREEZE_MS
        assert history.came(Arrival.PREPARED, 0, all_prepared_ms + 1)
        assert history.came(Arrival.FROZEN, all_prepared_ms, all_prepared_ms + FREEZE_MS)
        assert epoch.go_ms < epoch.freeze_by_ms


@given(st.integers(1, 3), st.integers(0, 12), _STEPS)
def test_it_is_taken_only_if_all_were_cut_after_go(
    vms: int, ordered: int, steps: list[tuple[str, Arrival | str, int]]
) -> None:
    history = lived(vms, in_order(vms, ordered) + steps)
    if history.epoch.cuts:
        assert history.epoch.key is GoKey.GO, "nobody is told to cut without it"
    if history.epoch.phase in (Phase.TAKEN, Phase.READABLE, Phase.RETIRED):
        assert history.came(Arrival.CUT, history.epoch.go_ms, history.now_ms + 1)
    if history.epoch.phase in (Phase.READABLE, Phase.RETIRED):
        assert history.came(Arrival.READABLE, history.epoch.go_ms, history.now_ms + 1)


@given(st.integers(1, 3), st.integers(0, 12), _STEPS, st.integers(0, 10_000))
def test_an_arrival_that_was_counted_changes_nothing_whenever_it_comes_again(
    vms: int, ordered: int, steps: list[tuple[str, Arrival | str, int]], later_ms: int
) -> None:
    history = lived(vms, in_order(vms, ordered) + steps)
    other_cut, other_copies = FACTS.model_copy(update={"freeze_ms": 99.0}), ReadFacts(copies=())
    for arrival in Arrival:
        other = {Arrival.CUT: other_cut, Arrival.READABLE: other_copies}.get(arrival)
        for vm in history.epoch.arrived(arrival):
            assert arrive(history.epoch, vm, arrival, history.now_ms + later_ms, other) == history.epoch


def pivoting(pivots: dict[str, str]) -> EpochSpec:
    times = {"prepare_ms": PREPARE_MS, "freeze_ms": FREEZE_MS, "hold_ms": HOLD_MS}
    return EpochSpec(participants=(DB, WEB), pivots=pivots, **times)


@pytest.mark.parametrize(
    ("pivots", "why"),
    [
        ({"db/vda": "/a.img"}, "all of its disks, or none: web/vda"),
        ({"db/vda": "/a.img", "web/vda": "/b.img", "web/vdb": "/c.img"}, "web/vdb"),
        ({"db/vda": "/a.img", "web/vda": "/a.img"}, "two disks pivot to one target"),
    ],
)
def test_all_disks_of_an_epoch_pivot_or_none(pivots: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        pivoting(pivots)


def test_a_pivot_has_neither_views_nor_copies() -> None:
    epoch = open_epoch("shop", 7, pivoting({"db/vda": "/a.img", "web/vda": "/b.img"}), 0)
    moved = FACTS.model_copy(update={"views": ()})
    assert checked_facts(epoch, "db", moved) is moved
    with pytest.raises(ValueError, match="one view"):
        checked_facts(epoch, "db", FACTS)
    none = ReadFacts(copies=())
    assert checked_reads(epoch, "db", none) is none
