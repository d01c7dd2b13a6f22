"""Broker messages. A doorbell names a role, never a unit or a token: losing, repeating or delaying one is harmless.

Version 1: first.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MESSAGE_VERSION = 1
MOVER_ROLE = "mover"
DOORBELL_TASK = "flushpoint.doorbell"


class Doorbell(BaseModel):
    """Wakes a worker of `role`, which then claims whatever is ready."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = MESSAGE_VERSION
    role: str
    bell: str
    """Random; only counts outstanding doorbells."""
