"""When a group's next round is due, how fast it may copy, and whether its recovery point objective is kept. Pure.

The newest point grows older until the next one is published: for that to happen in time, a round begins as long before
as rounds have taken of late.
"""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

from coordinator.model.group import GroupPolicy, GroupRecord

LOOKED_BACK = 5
"""Rounds by which the length of the next one is told: the longest of them."""
MARGIN = 1.25
LOOK_S = 1.0
"""The coordinator looks at groups about twice a second, and is busy with others meanwhile."""
LONGEST_PAUSE_S = 60.0
"""Between two rounds of which the first failed, however long this goes on."""
PRUNE_EVERY_S = 60.0
"""Looking for what may go costs a listing of the repository's."""


def due_at(group: GroupRecord) -> float | None:
    """When the next round is to begin (Unix time, maybe long ago); None: when somebody asks for one."""
    rpo = group.spec.policy.rpo
    if rpo == 0:
        return None
    failed = _failures_in_a_row(group)
    if failed:
        return group.outcomes[-1].ended_at + min(rpo * 2.0 ** (failed - 1), LONGEST_PAUSE_S)
    if group.published == 0 or group.seeding:
        return 0.0
    took = [o.ended_at - o.begun_at for o in group.outcomes[-LOOKED_BACK:] if o.published]
    return group.published_cut_at + rpo - MARGIN * max(took, default=0.0) - LOOK_S


def misses_rpo(group: GroupRecord, now: float) -> bool:
    """Whether the newest point is older than it may be; one that was never protected has nothing that could be."""
    rpo = group.spec.policy.rpo
    return rpo > 0 and group.published > 0 and now - group.published_cut_at > rpo


def speed_at(policy: GroupPolicy, now: float) -> int:
    """Bytes a second over all disks; 0 is unlimited."""
    time = datetime.datetime.fromtimestamp(now, ZoneInfo(policy.time_zone)).strftime("%H:%M")
    for window in policy.speed_windows:
        wraps = window.begin > window.end
        if (window.begin <= time < window.end) or (wraps and (time >= window.begin or time < window.end)):
            return window.speed
    return policy.speed


def prune_is_due(group: GroupRecord, now: float) -> bool:
    return (
        not group.spec.policy.retention.keeps_all
        and group.published > group.pruned
        and now - group.pruned_at >= PRUNE_EVERY_S
    )


def _failures_in_a_row(group: GroupRecord) -> int:
    count = 0
    for outcome in reversed(group.outcomes):
        if outcome.published or outcome.is_step:
            break
        count += 1
    return count
