"""What an I/O error does to a job: the error policies of QEMU's block jobs (QAPI BlockdevOnError)."""

from __future__ import annotations

import enum
import errno

from coordinator.model.errors import Side
from coordinator.model.job import ErrorPolicy, IoStatus, JobSpec


class Action(enum.StrEnum):
    """What BLOCK_JOB_ERROR reports (QAPI BlockErrorAction)."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


def act_on_error(policy: ErrorPolicy, errno_: int) -> Action:
    """The one decision about an I/O error."""
    if policy is ErrorPolicy.ENOSPC:
        return Action.STOP if errno_ == errno.ENOSPC else Action.REPORT
    return {
        ErrorPolicy.REPORT: Action.REPORT,
        ErrorPolicy.IGNORE: Action.IGNORE,
        ErrorPolicy.STOP: Action.STOP,
    }[policy]


def policy_of(spec: JobSpec, side: Side) -> ErrorPolicy:
    return spec.on_source_error if side is Side.SOURCE else spec.on_target_error


def io_status_after(errno_: int) -> IoStatus:
    return IoStatus.NOSPACE if errno_ == errno.ENOSPC else IoStatus.FAILED


def status_field(side: Side) -> str:
    """Which field of the job record the error sets: the job's own is the source's, as in query-block-jobs."""
    return "io_status" if side is Side.SOURCE else "target_io_status"
