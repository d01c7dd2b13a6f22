"""What an I/O error does to a job: the error policies of QEMU's block jobs (QAPI BlockdevOnError)."""

from __future__ import annotations

import enum
import errno
from collections.abc import Sequence

from coordinator.model.errors import Side
from coordinator.model.job import ErrorPolicy, IoStatus, JobSpec


class Action(enum.StrEnum):
    """What BLOCK_JOB_ERROR reports (QAPI BlockErrorAction)."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


MAY_STOP = frozenset({ErrorPolicy.STOP, ErrorPolicy.ENOSPC})


def act_on_error(policy: ErrorPolicy, errno_: int) -> Action:
    """The one decision about an I/O error."""
    if policy is ErrorPolicy.ENOSPC:
        return Action.STOP if errno_ == errno.ENOSPC else Action.REPORT
    return {
        ErrorPolicy.REPORT: Action.REPORT,
        ErrorPolicy.IGNORE: Action.IGNORE,
        ErrorPolicy.STOP: Action.STOP,
    }[policy]


def act_on_quarantine(spec: JobSpec, errors: Sequence[str]) -> Action:
    """What units do to a job that were given up after too many attempts; `errors` are those their holders told of.

    Such an error has had its policy asked at each attempt, and that was ignore. An attempt that ended without a word
    ("": a worker died, or a mistake of ours) tells neither its side nor a number, so that both policies are asked; one
    that may stop does, since a pause loses nothing. IGNORE: the job fails once all else is copied.
    """
    policies = {spec.on_source_error, spec.on_target_error}
    if not all(errors) and policies & MAY_STOP:
        return Action.STOP
    return Action.IGNORE if ErrorPolicy.IGNORE in policies else Action.REPORT


def policy_of(spec: JobSpec, side: Side) -> ErrorPolicy:
    return spec.on_source_error if side is Side.SOURCE else spec.on_target_error


def io_status_after(errno_: int) -> IoStatus:
    return IoStatus.NOSPACE if errno_ == errno.ENOSPC else IoStatus.FAILED


def status_field(side: Side) -> str:
    """Which field of the job record the error sets: the job's own is the source's, as in query-block-jobs."""
    return "io_status" if side is Side.SOURCE else "target_io_status"
