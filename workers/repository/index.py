"""Where a block of some digest is stored already: a cache, kept on this host, never the truth.

What it says is believed only if the pack is still there and was not condemned before this epoch was opened. A pack that
is condemned later stays until the epoch is decided, and is alive then if the epoch refers to it.
"""

from __future__ import annotations

import contextlib
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
_SCHEMA = """
create table if not exists packs (id integer primary key, pack blob unique not null);
create table if not exists runs (
    digest blob primary key, pack integer not null, offset integer not null,
    length integer not null, raw integer not null
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

    def is_empty(self) -> bool:
        with self._lock, self._tolerant():
            if self._connection is not None:
                return self._connection.execute("select 1 from runs limit 1").fetchone() is None
        return False

    def find(self, digests: Collection[bytes]) -> Mapping[bytes, Run]:
        if not digests:
            return {}
        rows: list[tuple[bytes, bytes, int, int, int]] = []
        with self._lock, self._tolerant():
            if self._connection is not None:
                marks = ",".join("?" * len(digests))
                query = f"select digest, packs.pack, offset, length, raw from runs join packs on packs.id = runs.pack where digest in ({marks})"  # noqa: E501
                rows = self._connection.execute(query, tuple(digests)).fetchall()
        found = {digest: Run(pack, at, length, bool(raw), digest) for digest, pack, at, length, raw in rows}
        return {digest: run for digest, run in found.items() if self._may_be_used(run.pack)}

    def learn(self, runs: Iterable[Run]) -> None:
        with self._lock, self._tolerant():
            if self._connection is None:
                return
            with self._connection:
                ids: dict[bytes, int] = {}
                for run in runs:
                    if run.pack not in ids:
                        ids[run.pack] = self._id_of(self._connection, run.pack)
                    row = (run.digest, ids[run.pack], run.offset, run.length, run.raw)
                    self._connection.execute("insert or replace into runs values (?, ?, ?, ?, ?)", row)
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
        (count,) = connection.execute("select count(*) from runs").fetchone()
        if count > MAX_RUNS:
            (middle,) = connection.execute(
                "select id from packs order by id limit 1 offset (select count(*) / 2 from packs)"
            ).fetchone()
            connection.execute("delete from runs where pack < ?", (middle,))
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
                self._path.unlink(missing_ok=True)
