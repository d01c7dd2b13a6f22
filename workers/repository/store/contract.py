"""What a repository asks of the place that keeps its objects; the rest of the repository knows nothing of S3.

Keys are relative names with slashes, such as ``packs/3f…``. An object is seen whole or not at all, and once a call
has returned it is durable. Nothing here retries for ever: what cannot be had is an error that says so.

======================  =========================================================================================
``MissingObjectError``  there is no object of that key
``NotFoundError``       there is no such directory or bucket
``RefusedError``        rights, credentials or a setting are wrong: a person has to act
``UnavailableError``    the store did not answer, or was too busy, for as long as a call has patience: try later
``ShortObjectError``    the object ends before what was asked for: it is not what was written (a StoreError)
``StoreError``          all else; its `errno` tells a full store (ENOSPC) from the rest
======================  =========================================================================================
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError

Buffer = bytes | bytearray | memoryview
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}"
_KEY = re.compile(rf"{_PART}(/{_PART})*")
_PREFIX = re.compile(rf"({_PART}/)*({_PART})?")
_KEY_CHARACTERS = 900
"""S3 allows 1024 bytes, together with the prefix of the repository."""


class MissingObjectError(NotFoundError):
    """There is no object of that key."""

    code = "missing-object"


class StoreError(FlushpointError):
    """The store refused or broke off, after all retries; the message names the object, the remedy what to look at.

    `errno` is a POSIX number: ENOSPC if the store has no room, EIO where nothing better is known.
    """

    code = "store"

    def __init__(self, message: str, remedy: str = "", *, errno_: int = errno.EIO) -> None:
        super().__init__(message, remedy)
        self.errno = errno_


class ShortObjectError(StoreError):
    """The object ends before what was asked for."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """`modified` is by the store's clock, with a time zone; `size` in bytes."""

    key: str
    size: int
    modified: datetime


def check_key(key: str) -> str:
    """`key` itself, if it can be a name in every store; RefusedError for what would lead out of the repository."""
    if len(key) > _KEY_CHARACTERS or not _KEY.fullmatch(key):
        raise RefusedError(f"{key[:100]!r} is no key of an object", _KEY_REMEDY)
    return key


def check_prefix(prefix: str) -> str:
    """As `check_key`, for the beginning of keys: it may be empty, or end in a slash."""
    if len(prefix) > _KEY_CHARACTERS or not _PREFIX.fullmatch(prefix):
        raise RefusedError(f"{prefix[:100]!r} is no prefix of keys", _KEY_REMEDY)
    return prefix


_KEY_REMEDY = "if the repository names it so, it is damaged or forged: run flushpoint repository check"


class Upload(Protocol):
    """One object being written piece by piece; bounded memory whatever its size. Not thread-safe.

    Used in a `with` statement. Left without `commit`, or by an exception, nothing of it becomes visible and its
    parts are removed; what a killed process leaves is removed by `ObjectStore.abort_uploads`.
    """

    def write(self, data: Buffer) -> None:
        """Append. The buffer may be reused as soon as this returns."""

    def commit(self) -> None:
        """Make the object visible, whole and durable. After an UnavailableError it may be there or not."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


ReadNext = Callable[[int], Buffer]
"""The next so many bytes of what is being fetched, exactly."""


class ObjectStore(Protocol):
    """Thread-safe; opened in the process that uses it. Every call raises the errors of the table above."""

    @property
    def name(self) -> str:
        """How messages call it: its URI without options."""

    def get(self, key: str) -> bytes:
        """The whole object, or MissingObjectError."""

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` (at least 1) bytes from `offset`; MissingObjectError; ShortObjectError if it ends before."""

    def stream_range(self, key: str, offset: int, length: int, consume: Callable[[ReadNext], None]) -> None:
        """Call `consume`, which reads those bytes as they come. The errors of `get_range`, and FlushpointErrors of its.

        After a broken connection it is called again and reads from `offset` again, so it has to be idempotent. What it
        does not read is dropped.
        """

    def size(self, key: str) -> int | None:
        """Its size in bytes, None if there is no such object."""

    def put(self, key: str, data: Buffer) -> None:
        """Write a whole object, over an older one of that key."""

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write it only if there is no object of that key: of many callers at once exactly one gets True.

        When an attempt's answer was lost, the object that is there is compared with `data`, and True means that
        they are the same. Callers that compete must therefore write different data: a nonce in it is enough. That
        holds within one call; after an error (or a crash) the caller reads the object to see whose it is.
        """

    def upload(self, key: str) -> Upload:
        """For objects that are made piece by piece, such as packs."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`; streaming, a page at a time.

        Those of one directory (keys that differ after their last slash only) come sorted by key. Across directories
        the order is the store's: S3 lists ``a-b`` before ``a/c``, SeaweedFS the other way round.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""

    def abort_uploads(self, older_than_s: float) -> int:
        """Remove what uploads begun more than `older_than_s` ago left behind, unseen; returns how many.

        Only the age tells a killed upload from one under way: take hours.
        """

    @property
    def locks(self) -> bool:
        """Whether objects are locked against removal for some days, which have to be extended."""

    def extend_lock(self, key: str) -> None:
        """Under object lock: keep it for the configured days from now. Nothing where no lock is configured."""

    def close(self) -> None:
        """Give connections back; the store is not used afterwards."""
