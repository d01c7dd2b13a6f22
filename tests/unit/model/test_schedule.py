"""When rounds of groups are due, how fast they copy, and when a recovery point objective is missed."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest

from coordinator.model.epoch import Participant
from coordinator.model.group import GroupPolicy, GroupRecord, GroupSpec, Outcome
from coordinator.model.point import Retention
from coordinator.model.schedule import (
    LONGEST_PAUSE_S,
    PRUNE_EVERY_S,
    due_at,
    misses_rpo,
    prune_is_due,
    speed_at,
)

MEMBERS = (Participant(vm="db", host="hv1", qmp="/db", disks=("vda",)),)
NOW = 1_000_000.0


def group(policy: GroupPolicy, cut_at: float = 0.0, *outcomes: Outcome) -> GroupRecord:
    spec = GroupSpec(repository="repo+file:///r", policy=policy, members=MEMBERS)
    published = sum(outcome.published for outcome in outcomes)
    return GroupRecord(name="shop", spec=spec, published=published, published_cut_at=cut_at, outcomes=outcomes)


def outcome(took_s: float, *, published: bool = True, ended_at: float = NOW) -> Outcome:
    return Outcome(round="r", requests=(), number=1, published=published, begun_at=ended_at - took_s, ended_at=ended_at)


def test_without_an_objective_rounds_are_begun_for_those_who_ask() -> None:
    assert due_at(group(GroupPolicy(), NOW, outcome(1))) is None
    assert not misses_rpo(group(GroupPolicy(), NOW, outcome(1)), NOW + 1e9)


def test_the_first_round_is_due_at_once() -> None:
    due = due_at(group(GroupPolicy(rpo=5)))
    assert due is not None
    assert due <= NOW


def test_a_round_begins_so_early_that_its_point_comes_in_time() -> None:
    """Judged by the longest of the last rounds."""
    quick = due_at(group(GroupPolicy(rpo=60), NOW, outcome(2)))
    slow = due_at(group(GroupPolicy(rpo=60), NOW, outcome(2), outcome(20), outcome(2)))
    assert quick is not None
    assert slow is not None
    assert NOW < slow <= NOW + 60 - 20
    assert slow < quick < NOW + 60 - 2


def test_rounds_that_take_longer_than_the_objective_follow_one_another() -> None:
    due = due_at(group(GroupPolicy(rpo=5), NOW, outcome(8)))
    assert due is not None
    assert due <= NOW


def test_after_failures_the_next_round_waits_longer_and_longer_but_not_for_ever() -> None:
    failures = [outcome(1, published=False) for _ in range(12)]
    pauses = []
    for count in range(1, len(failures)):
        due = due_at(group(GroupPolicy(rpo=5), NOW - 10, outcome(1), *failures[:count]))
        assert due is not None
        pauses.append(due - NOW)
    assert pauses[0] == 5
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S


def test_an_objective_is_missed_once_the_newest_point_is_older() -> None:
    kept = group(GroupPolicy(rpo=5), NOW, outcome(1))
    assert not misses_rpo(kept, NOW + 5)
    assert misses_rpo(kept, NOW + 5.1)
    assert not misses_rpo(group(GroupPolicy(rpo=5)), NOW + 1e9), "there was never a point that could be too old"


@pytest.mark.parametrize(
    ("time", "speed"),
    [("07:59", 0), ("08:00", 10), ("17:59", 10), ("18:00", 0), ("21:59", 0), ("22:00", 20), ("05:59", 20)],
)
def test_the_speed_is_that_of_the_window_in_the_zone_of_its_owner(time: str, speed: int) -> None:
    windows = [
        {"from": "08:00", "to": "18:00", "speed": 10},
        {"from": "22:00", "to": "06:00", "speed": "20"},
    ]
    policy = GroupPolicy.model_validate({"speedWindows": windows, "timeZone": "Asia/Kolkata"})
    hour, minute = map(int, time.split(":"))
    at = datetime.datetime(2026, 11, 27, hour, minute, tzinfo=ZoneInfo("Asia/Kolkata"))
    assert speed_at(policy, at.timestamp()) == speed


def test_outside_all_windows_the_policy_has_a_speed_of_its_own() -> None:
    policy = GroupPolicy.model_validate(
        {"speed": "50M", "speedWindows": [{"from": "00:00", "to": "00:01", "speed": 1}]}
    )
    noon = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.UTC)
    assert speed_at(policy, noon.timestamp()) == 50 * 1024**2


def test_points_are_pruned_now_and_then_and_only_after_new_ones() -> None:
    policy = GroupPolicy(retention=Retention(last=3))
    fresh = group(policy, NOW, outcome(1))
    assert prune_is_due(fresh, NOW)
    assert not prune_is_due(group(GroupPolicy(), NOW, outcome(1)), NOW), "nobody said which points to keep"
    pruned = fresh.model_copy(update={"pruned": 1, "pruned_at": NOW})
    assert not prune_is_due(pruned, NOW + 1e6)
    later = pruned.model_copy(update={"published": 2})
    assert not prune_is_due(later, NOW + PRUNE_EVERY_S - 1)
    assert prune_is_due(later, NOW + PRUNE_EVERY_S)
