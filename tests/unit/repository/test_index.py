"""The index of blocks is a cache: whatever is wrong with it costs deduplication, and nothing else."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest

from coordinator.model.extent import BLOCK_BYTES
from workers.repository.index import SqliteIndex
from workers.repository.runs import Run

P, Q = b"P" * 16, b"Q" * 16


def runs_of(pack: bytes, count: int = 20) -> list[Run]:
    digests = [hashlib.blake2b(pack + bytes([n]), digest_size=32).digest() for n in range(count)]
    return [Run(pack, 100 + n * BLOCK_BYTES, BLOCK_BYTES, True, digest) for n, digest in enumerate(digests)]


def opened(path: Path) -> SqliteIndex:
    return SqliteIndex(path, (), lambda pack: True)


def learned(path: Path, pack: bytes) -> list[Run]:
    index = opened(path)
    index.learn(runs_of(pack))
    index.close()
    return runs_of(pack)


def found(path: Path, runs: list[Run]) -> list[Run]:
    index = opened(path)
    told = index.find([run.digest for run in runs])
    index.close()
    return list(told.values())


def test_what_was_learned_is_found(tmp_path: Path) -> None:
    runs = learned(tmp_path / "index", P)
    assert sorted(found(tmp_path / "index", runs), key=lambda run: run.offset) == runs


def test_a_block_is_not_looked_for_in_another_pack_after_a_power_failure(tmp_path: Path) -> None:
    """Of what was written at last only some has come to the disk: the packs are gone, and their numbers given anew."""
    runs = learned(tmp_path / "index", P)
    with sqlite3.connect(tmp_path / "index") as connection:
        connection.execute("delete from packs")
    connection.close()
    learned(tmp_path / "index", Q)
    assert found(tmp_path / "index", runs) == []
    assert len(found(tmp_path / "index", runs_of(Q))) == 20
    learned(tmp_path / "index", P)
    assert len(found(tmp_path / "index", runs)) == 20


@pytest.mark.parametrize("rot", ["offset = offset + 1", "offset = -offset", "offset = 'text'", "length = 1", "raw = 0"])
def test_a_row_that_is_another_than_was_written_is_not_believed(tmp_path: Path, rot: str) -> None:
    runs = learned(tmp_path / "index", P)
    with sqlite3.connect(tmp_path / "index") as connection:
        connection.execute(f"update blocks set {rot}")
    connection.close()
    assert found(tmp_path / "index", runs) == []


def test_a_file_that_is_none_is_made_anew(tmp_path: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        (tmp_path / f"index{ending}").write_bytes(b"rot" * 10_000)
    assert found(tmp_path / "index", learned(tmp_path / "index", P)) == []
    assert len(found(tmp_path / "index", learned(tmp_path / "index", P))) == 20


def test_rows_of_older_versions_are_dropped(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "index") as connection:
        connection.execute("create table runs (digest blob primary key) without rowid")
    connection.close()
    assert len(found(tmp_path / "index", learned(tmp_path / "index", P))) == 20
    with sqlite3.connect(tmp_path / "index") as connection:
        assert connection.execute("select name from sqlite_master where name = 'runs'").fetchall() == []
    connection.close()
