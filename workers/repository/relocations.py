"""Where compaction took what lived in a pack: moved/<pack>, read only when the pack itself is gone.

Maps, pages and manifests are never rewritten: they go on naming the old pack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from workers.repository.keyring import Keyring
from workers.repository.layout import PACKS, DamageError, moved_key, pack_key
from workers.repository.runs import Run
from workers.repository.segment_map import MapRef
from workers.repository.store.contract import MissingObjectError, ObjectStore

MAX_HOPS = 100_000
"""What was moved may be moved again. Only a bound for a ring of records, which no compaction makes."""


class Moved(BaseModel):
    """moved/<pack>: for the offset of each run and map that was alive, the number of its pack in `packs`, and its
    offset there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    pack: str
    packs: tuple[str, ...]
    places: tuple[tuple[int, int, int], ...]
    seal: str = ""


class Relocations:
    """Follows runs and maps to where they are now. Thread-safe; caches what it has read."""

    def __init__(self, store: ObjectStore, keyring: Keyring) -> None:
        self._store = store
        self._keyring = keyring
        self._known: dict[bytes, Mapping[int, tuple[bytes, int]]] = {}

    def run(self, run: Run) -> Run:
        """Where `run` is now that its pack is gone. DamageError if nobody moved it."""
        pack, offset = self._place(run.pack, run.offset, run.length)
        return replace(run, pack=pack, offset=offset)

    def map(self, ref: MapRef) -> MapRef:
        pack, offset = self._place(ref.pack, ref.offset, ref.length)
        return replace(ref, pack=pack, offset=offset)

    def current_run(self, run: Run, moved: AbstractSet[bytes]) -> Run:
        """Where `run` is by the records of the `moved` packs, whether the old packs are still there or not."""
        while run.pack in moved:
            run = self.run(run)
        return run

    def current_map(self, ref: MapRef, moved: AbstractSet[bytes]) -> MapRef:
        while ref.pack in moved:
            ref = self.map(ref)
        return ref

    def read(self, pack: bytes) -> Moved | None:
        """The record of a pack, None if it was never compacted."""
        key = moved_key(pack)
        try:
            moved = Moved.model_validate_json(self._store.get(key))
        except MissingObjectError:
            return None
        except ValidationError as error:
            raise DamageError("the record", key) from error
        if moved.seal != self._seal_of(moved) or moved.pack != pack.hex():
            raise DamageError("the record", key)
        return moved

    def write(self, pack: bytes, places: Mapping[int, tuple[bytes, int]]) -> bool:
        """Say where everything alive of `pack` is from now on; the new packs are durable already. False, and nothing is
        written, if an earlier record says so already and what it leads to is there."""
        there = self.read(pack)
        if there is not None and all(self._store.size(f"{PACKS}{to}") is not None for to in there.packs):
            return False
        packs = list(dict.fromkeys(where for where, _ in places.values()))
        entries = tuple((old, packs.index(where), new) for old, (where, new) in sorted(places.items()))
        moved = Moved(pack=pack.hex(), packs=tuple(p.hex() for p in packs), places=entries)
        sealed = moved.model_copy(update={"seal": self._seal_of(moved)})
        data = json.dumps(sealed.model_dump(mode="json")).encode()
        if there is None:
            return self._store.put_if_absent(moved_key(pack), data)
        self._store.put(moved_key(pack), data)  # over one that leads nowhere
        return True

    def _place(self, pack: bytes, offset: int, length: int) -> tuple[bytes, int]:
        places = self._known.get(pack)
        if places is None:
            moved = self.read(pack)
            if moved is None:
                raise DamageError("a pack that is missing, wanted", pack_key(pack), offset, length)
            ids = [bytes.fromhex(p) for p in moved.packs]
            places = self._known[pack] = {old: (ids[n], new) for old, n, new in moved.places}
        if offset not in places:
            raise DamageError("a pack of which too little was moved, wanted", pack_key(pack), offset, length)
        return places[offset]

    def _seal_of(self, moved: Moved) -> str:
        fields = moved.model_dump(mode="json", exclude={"seal"})
        return self._keyring.digest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hex()
