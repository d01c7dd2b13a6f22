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
    GROUP_ABORTED = "GROUP_ABORTED"
    """A round of a group ended without a recovery point: {group, epoch, error}; epoch 0 if none was announced."""
