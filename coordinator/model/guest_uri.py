"""A disk of a live guest, by the guest's monitor: ``qemu+unix:///DEVICE?qmp=PATH[&host=NAME]``.

DEVICE is the id of the disk's device in QEMU, PATH the socket of a QMP monitor on the guest's host, and NAME what that
host's agent is called; without it, it is the host on which the URI is read.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from coordinator.model.errors import UsageError

SCHEME = "qemu+unix"
_EXAMPLE = f"write {SCHEME}:///DEVICE?qmp=/path/of/its/monitor"


@dataclass(frozen=True, slots=True)
class GuestDiskUri:
    device: str
    qmp: str
    host: str = ""

    @property
    def vm(self) -> str:
        """What the machine is called when nobody says: its socket's name without ending."""
        stem = posixpath.splitext(posixpath.basename(self.qmp))[0]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:128] or "guest"


def is_guest_disk(text: str) -> bool:
    return text.startswith(f"{SCHEME}:")


def parse_guest_disk(text: str) -> GuestDiskUri:
    """UsageError for what names no disk of a guest."""
    parts = urlsplit(text)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    device = unquote(parts.path.removeprefix("/"))
    is_whole = "qmp" in query and query.keys() <= {"qmp", "host"} and len(query) == len(pairs) and all(query.values())
    if parts.netloc or parts.fragment or not device or not is_whole or not query["qmp"].startswith("/"):
        raise UsageError(f"{text!r} names no disk of a guest", _EXAMPLE)
    return GuestDiskUri(device, query["qmp"], query.get("host", ""))
