"""What a check of a machine, a deployment or a guest found out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One check; `remedy` says what to do if it is not `ok`, which is a failure where it is `required`."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str = ""
