"""How a JobRecord travels to and from a Redis hash, and which of its fields a step may change."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.ledger.contract import NewEvent
from coordinator.model.job import JobRecord, JobSpec

_KEPT_BY_LEDGER = frozenset(
    {"id", "spec", "created_at", "units_ready", "units_leased", "units_done", "units_quarantined"}
)
UPDATE_FIELDS = frozenset(JobRecord.model_fields) - _KEPT_BY_LEDGER
RELEASE_FIELDS = frozenset({"io_status", "target_io_status", "pause_requested", "error", "error_code", "fatal"})
OPENED_FIELDS = frozenset(
    {
        "disk_size",
        "block_size",
        "max_writers",
        "source_stamp",
        "source_written",
        "target_zeroed",
        "source_may_change",
        "compare_reason",
        "bitmap",
        "source_point",
        "group",
        "disk",
        "epoch",
        "parent_epoch",
        "on_parent",
        "pass_root",
        "cut_at",
        "published",
        "result",
    }
)


def spec_text(spec: JobSpec) -> str:
    """The same text for equal specs."""
    return spec.model_dump_json()


def checked(changes: Mapping[str, Any], allowed: frozenset[str]) -> Mapping[str, Any]:
    """ValueError, a mistake of the caller, for a field that this step must not change."""
    if unknown := sorted(set(changes) - allowed):
        raise ValueError(f"this step cannot change {', '.join(unknown)} of a job")
    return changes


def fields_of(changes: Mapping[str, Any]) -> list[str]:
    """Field, value, field, value… as the job's hash holds them."""
    return [text for name, value in changes.items() for text in (name, _field_text(value))]


def events_of(events: Sequence[NewEvent]) -> list[str]:
    """Name, JSON, name, JSON…"""
    return [text for event in events for text in (str(event.name), json.dumps(dict(event.data)))]


def record_of(fields: Mapping[str, str]) -> JobRecord:
    return JobRecord.model_validate({**fields, "spec": JobSpec.model_validate_json(fields["spec"])})


def pairs(flat: Sequence[str]) -> dict[str, str]:
    """What HGETALL gives inside a script."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _field_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, enum.Enum):
        return str(value.value)
    return str(value)
