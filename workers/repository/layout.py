"""Names and sizes of a repository's objects, and the error for one that is not as it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping

import blake3

from coordinator.model.errors import DamagedError
from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES
from workers.repository.store.contract import ObjectInfo, ObjectStore, ReadNext, ShortObjectError

FORMAT = 1
"""Version of the format; a repository of a newer one is refused."""
BLOCKS_A_SEGMENT = SEGMENT_BYTES // BLOCK_BYTES
SEGMENTS_A_PAGE = 512
"""A page of a root covers 4 GiB: few enough to rewrite for one changed segment, enough to keep a directory short."""

REPOSITORY_KEY = "repository.json"
KEYS, PACKS, DISKS, GROUPS, HOLDS = "keys/", "packs/", "disks/", "groups/", "holds/"
MOVED, CONDEMNED, OWNERS = "moved/", "condemned/", "owners/"
COMPACTION = ".compaction"
"""Stands for a group in the holds and packs of a compaction; no group can have this name."""
ID_BYTES = 16
"""Of repositories, packs and keys: random, so that no two ever meet."""
_ID = re.compile(r"[0-9a-f]{32}")
DIGEST_BYTES = 32


class DamageError(DamagedError):
    """Something of the repository is not what was written. `key` names the object, `offset` and `length` (bytes) where.

    `offset` is -1 for the object as a whole.
    """

    def __init__(self, what: str, key: str, offset: int = -1, length: int = 0) -> None:
        where = f" at {offset}+{length}" if offset >= 0 else ""
        super().__init__(
            f"{what} in {key}{where} is damaged", "run flushpoint repository check; the next backup writes it anew"
        )
        self.key = key
        self.offset = offset
        self.length = length


def read_range(store: ObjectStore, key: str, offset: int, length: int) -> bytes:
    """A piece that was written of an object. DamageError if the object ends before; else as `get_range`."""
    try:
        return store.get_range(key, offset, length)
    except ShortObjectError as error:
        raise DamageError("a piece beyond the end, wanted", key, offset, length) from error


def stream_range(store: ObjectStore, key: str, offset: int, length: int, consume: Callable[[ReadNext], None]) -> None:
    """The same, streamed."""
    try:
        store.stream_range(key, offset, length, consume)
    except ShortObjectError as error:
        raise DamageError("a piece beyond the end, wanted", key, offset, length) from error


def plain_seal(fields: Mapping[str, object]) -> str:
    """Hex BLAKE3 of a record's canonical JSON without its seal: for the records that are read before any key is known,
    so that a damaged one is told from a wrong key."""
    kept = {name: value for name, value in fields.items() if name != "seal"}
    return blake3.blake3(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def named_by_id(store: ObjectStore, prefix: str) -> Iterator[tuple[bytes, ObjectInfo]]:
    """Objects that are called `prefix` and an id, with that id. What else somebody has put there is not ours, and
    stays."""
    for info in store.list(prefix):
        if _ID.fullmatch(info.key, len(prefix)):
            yield bytes.fromhex(info.key.removeprefix(prefix)), info


def pack_key(pack: bytes) -> str:
    return f"{PACKS}{pack.hex()}"


def moved_key(pack: bytes) -> str:
    """Says where compaction took what lived in a pack."""
    return f"{MOVED}{pack.hex()}"


def root_key(disk: str, group: str, epoch: int, nonce: str) -> str:
    return f"{DISKS}{disk}/roots/{group}-{epoch}-{nonce}"


def point_key(group: str, epoch: int) -> str:
    """Zero-padded, so that listing is in order of epochs."""
    return f"{points_prefix(group)}{epoch:010d}.json"


def points_prefix(group: str) -> str:
    return f"{GROUPS}{group}/points/"


def retained_prefix(group: str) -> str:
    return f"{GROUPS}{group}/retained/"


def hold_key(hold: str) -> str:
    return f"{HOLDS}{hold}.json"
