"""The byte locks by which QEMU processes tell each other how they hold an image (QEMU, block/file-posix.c).

A process that holds permission n on an image has a shared OFD lock on byte 100 + n, and one on byte 200 + n
if it does not let others have that permission. n is 1 for write and 3 for resize (BLK_PERM_*). Tried with
qemu-nbd 7.2: a read-only export of a qcow2 image locks 100, 201 and 203; a writable one 100, 101, 103, 201
and 203; a writable raw one 100, 101 and 203.
"""

from __future__ import annotations

import fcntl
import struct

_F_OFD_GETLK = 36  # <fcntl.h>; Python 3.11's fcntl does not name it
_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid
_PERMISSION_BASE = 100
_WRITE = 1
_RESIZE = 3


def has_writer(fd: int) -> bool:
    """Whether a QEMU process holds the file open for writing. `fd` may be read-only; no lock is taken."""
    return any(_is_locked(fd, _PERMISSION_BASE + bit) for bit in (_WRITE, _RESIZE))


def has_holder(fd: int) -> bool:
    """Whether a QEMU process has the file open in any way."""
    return _is_locked(fd, _PERMISSION_BASE, length=200)


def _is_locked(fd: int, byte: int, length: int = 1) -> bool:
    # Asking for an exclusive lock finds every lock of others, shared ones too.
    question = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, length, 0)
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, question)
    except OSError:  # a file system without locks cannot tell: QEMU could not have locked there either
        return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
