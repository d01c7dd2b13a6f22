"""Errors that a person or a program meets, each with what it is about and what to do about it.

Every error carries a `remedy`; the command line prints ``message. remedy`` and leaves with `exit_code`
(DESIGN: 0 done, 1 the job failed, 2 usage, 3 refused or not found, 4 interrupted and resumable).
"""

from __future__ import annotations

import enum
import errno


class FlushpointError(Exception):
    """Base of all errors that are meant to be read by an operator."""

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy[0].upper()}{self.remedy[1:]}" if self.remedy else self.message


class UsageError(FlushpointError):
    """What was asked for makes no sense as it is written."""

    exit_code = 2
    code = "usage"


class RefusedError(FlushpointError):
    """What was asked for is understood, and must not be done."""

    exit_code = 3
    code = "refused"


class NotFoundError(RefusedError):
    """A job, a file, an export or a bitmap that does not exist."""

    code = "not-found"


class DamagedError(FlushpointError):
    """Something stored is not what was written; the message says where."""

    exit_code = 5
    code = "damaged"


class UnavailableError(FlushpointError):
    """A part that should answer does not; nothing is lost, the same call may be made again."""

    exit_code = 4
    code = "unavailable"


class Side(enum.StrEnum):
    """Which end of a copy an I/O error came from."""

    SOURCE = "source"
    TARGET = "target"


class Next(enum.StrEnum):
    """What the holder of a connection may do after an error on it."""

    RETRY = "retry"
    """The same request may be sent again on the same connection."""
    RECONNECT = "reconnect"
    """The connection is unusable; a new one may succeed."""
    GIVE_UP = "give-up"
    """Repeating cannot help: the request or the peer is at fault."""


class DiskIOError(FlushpointError):
    """A read, write or flush of a disk failed.

    `errno` is a POSIX number (EIO when the peer gave none), `offset` and `length` in bytes name the range
    (-1 and 0 for a flush or a lost connection), `next` says what may be done now.
    """

    code = "io-error"

    def __init__(
        self,
        message: str,
        *,
        errno_: int = errno.EIO,
        offset: int = -1,
        length: int = 0,
        next_: Next = Next.RETRY,
        remedy: str = "",
    ) -> None:
        super().__init__(message, remedy)
        self.errno = errno_
        self.offset = offset
        self.length = length
        self.next = next_
