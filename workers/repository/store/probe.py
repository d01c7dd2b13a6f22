"""Finds out, with objects of its own, whether a store keeps what a repository relies on.

Stores that look like S3 differ most where it hurts: an older one answers 200 to a conditional write over an object that
is there, and two coordinators would both believe that they have decided an epoch.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coordinator.model.errors import FlushpointError
from workers.repository.store.contract import MissingObjectError, ObjectStore, StoreError

_WRITERS = 8
_RACES = 3
"""A store that looks before it writes loses one of them, if not the first."""
_SAMPLE_BYTES = 64 * 1024
_OFFSET, _LENGTH = 1000, 5000


@dataclass(frozen=True, slots=True)
class Findings:
    """`cannot` has a sentence for each False."""

    conditional_put: bool
    """Of many writers of one new key exactly one wins, and nobody overwrites what is there."""
    read_after_write: bool
    """A new object, a new version of it and its deletion are seen at once."""
    list_after_write: bool
    range_reads: bool
    cannot: tuple[str, ...] = ()


def probe(store: ObjectStore) -> Findings:
    """Raises what the contract says when the store cannot be used at all. Its objects are removed afterwards."""
    prefix = f"probe/{secrets.token_hex(8)}/"
    keys = [f"{prefix}{name}" for name in ("read", "listed", "range", "absent")]
    races = [f"{prefix}race-{number}" for number in range(_RACES)]
    read, listed, ranged, absent = keys
    try:
        reading = _read_after_write(store, read)
        listing = _list_after_write(store, prefix, listed)
        ranging = _range_reads(store, ranged)
        writing = _conditional_put(store, absent, races)
    except FlushpointError:
        with contextlib.suppress(FlushpointError):  # the first one tells more
            store.delete(keys + races)
        raise
    store.delete(keys + races)
    cannot = tuple(sentence for sentence in (writing, reading, listing, ranging) if sentence)
    return Findings(not writing, not reading, not listing, not ranging, cannot)


def _read_after_write(store: ObjectStore, key: str) -> str:
    """These checks return what the store cannot do, "" if it can."""
    for _ in range(2):
        data = secrets.token_bytes(_SAMPLE_BYTES)
        store.put(key, data)
        try:
            if store.get(key) != data or store.size(key) != len(data):
                return f"{store.name} does not read back what was just written"
        except MissingObjectError:
            return f"{store.name} does not show what was just written"
    store.delete([key])
    if store.size(key) is not None:
        return f"{store.name} still shows what was just deleted"
    return ""


def _list_after_write(store: ObjectStore, prefix: str, key: str) -> str:
    store.put(key, secrets.token_bytes(_SAMPLE_BYTES))
    listed = [(info.key, info.size) for info in store.list(prefix)]
    store.delete([key])
    if listed != [(key, _SAMPLE_BYTES)] or list(store.list(prefix)):
        return f"{store.name} does not list what was just written, or still lists what was just deleted"
    return ""


def _range_reads(store: ObjectStore, key: str) -> str:
    data = secrets.token_bytes(_SAMPLE_BYTES)
    store.put(key, data)
    try:
        if store.get_range(key, _OFFSET, _LENGTH) == data[_OFFSET : _OFFSET + _LENGTH]:
            return ""
    except StoreError as error:
        return f"{store.name} cannot read a part of an object: {error.message}"
    return f"{store.name} returns other bytes than asked for"


def _conditional_put(store: ObjectStore, key: str, races: list[str]) -> str:
    first = secrets.token_bytes(_SAMPLE_BYTES)
    try:
        if not store.put_if_absent(key, first):
            return f"{store.name} sees an object where there is none"
        if store.put_if_absent(key, secrets.token_bytes(_SAMPLE_BYTES)) or store.get(key) != first:
            return f"{store.name} overwrites an object when asked to write only if there is none"
        if not all(_has_one_winner(store, race) for race in races):
            return f"{store.name} lets more than one of several writers at once believe that it was the first"
    except StoreError as error:
        return f"{store.name} cannot write only if there is no object: {error.message}"
    return ""


def _has_one_winner(store: ObjectStore, key: str) -> bool:
    """Many writers of different data at once: exactly one is told that it wrote, and its data is there."""
    start = threading.Barrier(_WRITERS)

    def write(data: bytes) -> bytes | None:
        start.wait()
        return data if store.put_if_absent(key, data) else None

    samples = [secrets.token_bytes(_SAMPLE_BYTES) for _ in range(_WRITERS)]
    with ThreadPoolExecutor(_WRITERS) as threads:
        winners = [data for data in threads.map(write, samples) if data is not None]
    return winners == [store.get(key)]
