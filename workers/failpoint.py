"""Named points where the fault tests kill or stop a mover; nothing at all unless FLUSHPOINT_FAILPOINT is set.

``FLUSHPOINT_FAILPOINT=NAME:ACTION:FILE`` acts the first time any process passes point NAME: the one that can
create FILE (exclusively, writing its process id into it). ACTION is ``kill`` or ``stop`` (SIGKILL, SIGSTOP to itself).
"""

from __future__ import annotations

import os
import signal

_CHOSEN = os.environ.get("FLUSHPOINT_FAILPOINT", "")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def pass_point(name: str) -> None:
    """Called where a fault would hurt most."""
    if not _CHOSEN:
        return
    chosen, action, path = _CHOSEN.split(":", 2)
    if chosen != name:
        return
    try:
        marker = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return
    os.write(marker, str(os.getpid()).encode())
    os.fsync(marker)
    os.close(marker)
    os.kill(os.getpid(), _SIGNALS[action])
