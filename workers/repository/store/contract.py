"""What a repository asks of the place that keeps its objects; the rest of the repository knows nothing of S3.

Keys are relative names with slashes, such as ``packs/3f…``. An object is seen whole or not at all, and once a call
has returned it is durable. Nothing here retries for ever: what cannot be had is an error that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from coordinator.model.errors import FlushpointError, NotFoundError

Buffer = bytes | bytearray | memoryview


class MissingObjectError(NotFoundError):
    """There is no object of that key."""

    code = "missing-object"


class StoreError(FlushpointError):
    """The store refused or broke off, after all retries; the message names the object, the remedy what to look at."""

    code = "store"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """`modified` is by the store's clock, with a time zone; `size` in bytes."""

    key: str
    size: int
    modified: datetime


class Upload(Protocol):
    """One object being written piece by piece; bounded memory whatever its size. Not thread-safe.

    Left without `commit`, or by an exception, nothing of it becomes visible and its parts are removed.
    """

    def write(self, data: Buffer) -> None:
        """Append. The buffer may be reused as soon as this returns."""

    def commit(self) -> None:
        """Make the object visible, whole and durable."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ObjectStore(Protocol):
    """Thread-safe. Every call raises StoreError for what it cannot do, RefusedError for missing rights or credentials."""

    @property
    def name(self) -> str:
        """How messages call it: its URI without options."""

    def get(self, key: str) -> bytes:
        """The whole object, or MissingObjectError."""

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; MissingObjectError, or StoreError if the object ends before."""

    def size(self, key: str) -> int | None:
        """Its size in bytes, None if there is no such object."""

    def put(self, key: str, data: Buffer) -> None:
        """Write a whole object, over an older one of that key."""

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write it only if there is no object of that key: of many callers at once exactly one gets True.

        A caller whose own earlier attempt got through although its answer was lost also gets True: the object that
        is there is compared with `data`.
        """

    def upload(self, key: str) -> Upload:
        """For objects that are made piece by piece, such as packs."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, sorted by key; streaming, a page at a time."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""

    def abort_uploads(self, older_than_s: float) -> int:
        """Remove what killed uploads left behind and nobody can see; returns how many."""

    def extend_lock(self, key: str) -> None:
        """Under object lock: keep it for the configured days from now. Nothing where there is no lock."""

    def close(self) -> None: ...
