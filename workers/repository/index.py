"""Where a block of some digest is stored already: a cache, kept on this host, never the truth.

What it says is believed only if the pack is still there and was not condemned before this epoch was opened. A pack that
is condemned later stays until the epoch is decided, and is alive then if the epoch refers to it.

Each row proves itself: nobody reads the block again before the point is published, and one that was taken for another
is lost. Nothing else tells what a failing disk or a power failure has made of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from workers.repository.runs import Run

MAX_RUNS = 8_000_000
"""About 500 MiB of file, for half a TiB of different blocks; then the older half is forgotten."""
BUSY_S = 2.0
"""How long to wait for another mover of this host."""
_PROOF_BYTES = 8
_SCHEMA = """
drop table if exists runs; -- rows that did not prove themselves
create table if not exists packs (id integer primary key, pack blob unique not null);
create table if not exists blocks (
    digest blob primary key, pack integer not null, offset integer not null,
    length integer not null, raw integer not null, proof blob not null
) without rowid;
"""


class RunIndex(Protocol):
    """Thread-safe."""

    def find(self, digests: Collection[bytes]) -> Mapping[bytes, Run]:
        """The runs of those digests that are stored; the others are left out."""

    def learn(self, runs: Iterable[Run]) -> None:
        """Remember runs of packs that are durable."""

    def close(self) -> None: ...


class NoIndex:
    """Remembers nothing."""

    def find(self, digests: Collection[bytes]) -> Mapping[bytes, Run]:
        return {}

    def learn(self, runs: Iterable[Run]) -> None:
        return

    def close(self) -> None:
        return


class SqliteIndex:
    """A file that the movers of one host share. Whatever is wrong with it costs deduplication, and nothing else."""

    def __init__(self, path: Path, excluded: Collection[bytes], is_there: Callable[[bytes], bool]) -> None:
        """`excluded` are condemned packs; `is_there` asks the store for a pack, once each."""
        self._excluded = frozenset(excluded)
        self._is_there = is_there
        self._packs: dict[bytes, bool] = {}
        self._lock = threading.Lock()
        self._path = path
        self._connection: sqlite3.Connection | None = None
        with self._tolerant():
            self._connection = self._opened()

    def find(self, digests: Collection[bytes]) -> Mapping[bytes, Run]:
        if not digests:
            return {}
        rows: list[tuple[bytes, bytes, int, int, int, bytes]] = []
        with self._lock, self._tolerant():
            if self._connection is not None:
                marks = ",".join("?" * len(digests))
                query = (
                    "select digest, packs.pack, offset, length, raw, proof"
                    f" from blocks join packs on packs.id = blocks.pack where digest in ({marks})"
                )
                rows = self._connection.execute(query, tuple(digests)).fetchall()
        found = ((Run(pack, at, length, bool(raw), digest), proof) for digest, pack, at, length, raw, proof in rows)
        return {run.digest: run for run, proof in found if proof == _proof_of(run) and self._may_be_used(run.pack)}

    def learn(self, runs: Iterable[Run]) -> None:
        with self._lock, self._tolerant():
            if self._connection is None:
                return
            with self._connection:
                ids: dict[bytes, int] = {}
                for run in runs:
                    if run.pack not in ids:
                        ids[run.pack] = self._id_of(self._connection, run.pack)
                    row = (run.digest, ids[run.pack], run.offset, run.length, run.raw, _proof_of(run))
                    self._connection.execute("insert or replace into blocks values (?, ?, ?, ?, ?, ?)", row)
                self._forget_some(self._connection)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _may_be_used(self, pack: bytes) -> bool:
        if pack in self._excluded:
            return False
        if pack not in self._packs:
            self._packs[pack] = self._is_there(pack)
        return self._packs[pack]

    def _opened(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=BUSY_S, check_same_thread=False)
        # A cache: what a power failure leaves of it may be anything.
        connection.executescript("pragma journal_mode=wal; pragma synchronous=off;" + _SCHEMA)
        return connection

    @staticmethod
    def _id_of(connection: sqlite3.Connection, pack: bytes) -> int:
        connection.execute("insert or ignore into packs (pack) values (?)", (pack,))
        return int(connection.execute("select id from packs where pack = ?", (pack,)).fetchone()[0])

    @staticmethod
    def _forget_some(connection: sqlite3.Connection) -> None:
        """By packs, the oldest first; how many runs there are is estimated by the number of packs seen."""
        newest = connection.execute("select max(id) from packs").fetchone()[0]
        if newest is None or newest % 256:
            return
        (count,) = connection.execute("select count(*) from blocks").fetchone()
        if count > MAX_RUNS:
            (middle,) = connection.execute(
                "select id from packs order by id limit 1 offset (select count(*) / 2 from packs)"
            ).fetchone()
            connection.execute("delete from blocks where pack < ?", (middle,))
            connection.execute("delete from packs where id < ?", (middle,))

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A file that is damaged is made anew by the next who opens it; one that is busy or full is done without."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                for ending in ("-shm", "-wal", ""):  # what is left of the old file must not be read with the new one
                    Path(f"{self._path}{ending}").unlink(missing_ok=True)


def _proof_of(run: Run) -> bytes:
    """Of whatever types a damaged row has."""
    place = repr((run.digest, run.pack, run.offset, run.length, run.raw))
    return hashlib.blake2b(place.encode(), digest_size=_PROOF_BYTES).digest()
