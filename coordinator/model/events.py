"""Names of the events of a deployment's stream, as in QAPI where QEMU has one."""

from __future__ import annotations

import enum


class EventName(enum.StrEnum):
    BLOCK_JOB_ERROR = "BLOCK_JOB_ERROR"
    BLOCK_JOB_READY = "BLOCK_JOB_READY"
    BLOCK_JOB_COMPLETED = "BLOCK_JOB_COMPLETED"
    BLOCK_JOB_CANCELLED = "BLOCK_JOB_CANCELLED"
    JOB_STATUS_CHANGE = "JOB_STATUS_CHANGE"
    MIRROR_STATE_CHANGE = "MIRROR_STATE_CHANGE"
    RECOVERY_POINT = "RECOVERY_POINT"
    """A recovery point was published: {repository, group, epoch, cut_at}."""
    RPO_MISSED = "RPO_MISSED"
    """The newest recovery point of a group has become older than its policy allows: {group, epoch, rpo_s, age_s}."""
    RPO_RECOVERED = "RPO_RECOVERED"
    """It is not any more: the same."""
    GROUP_ABORTED = "GROUP_ABORTED"
    """A round of a group ended without a recovery point: {group, epoch, error}; epoch 0 if none was announced."""
    GROUP_COMPLETED = "GROUP_COMPLETED"
    """A group has its last point, or its guests run on its targets: {group, point, pivoted, downtimes_ms}."""
