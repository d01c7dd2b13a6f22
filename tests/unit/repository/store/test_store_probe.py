"""Stores that do not keep what a repository relies on are found out, each by its own sentence."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from coordinator.model.errors import UnavailableError
from workers.repository.store import Buffer, LocalStore, ObjectInfo, StoreError, probe


class Overwriting(LocalStore):
    """As SeaweedFS was: the condition is ignored."""

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        self.put(key, data)
        return True


class LookingFirst(LocalStore):
    """Looks, then writes: right for one writer, wrong for two."""

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        absent = self.size(key) is None
        if absent:
            self.put(key, data)
        return absent


class WithoutConditions(LocalStore):
    def put_if_absent(self, key: str, data: Buffer) -> bool:
        raise StoreError("a header implies functionality that is not implemented", errno_=errno.EOPNOTSUPP)


class Refusing(LocalStore):
    def put_if_absent(self, key: str, data: Buffer) -> bool:
        return False


class Stale(LocalStore):
    """Shows the first version of each object for ever."""

    def put(self, key: str, data: Buffer) -> None:
        if self.size(key) is None:
            super().put(key, data)


class Undead(LocalStore):
    """Deletes when it is told a second time only."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self._told: set[str] = set()

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        super().delete([key for key in keys if key in self._told])
        self._told.update(keys)


class Forgetful(LocalStore):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())


class Unranged(LocalStore):
    def get_range(self, key: str, offset: int, length: int) -> bytes:
        return self.get(key)


@pytest.mark.parametrize(
    ("kind", "lacking", "sentence"),
    [
        (Overwriting, "conditional_put", "overwrites an object when asked to write only if there is none"),
        (LookingFirst, "conditional_put", "more than one of several writers at once believe that it was the first"),
        (WithoutConditions, "conditional_put", "cannot write only if there is no object: a header implies"),
        (Refusing, "conditional_put", "sees an object where there is none"),
        (Stale, "read_after_write", "does not read back what was just written"),
        (Undead, "read_after_write", "still shows what was just deleted"),
        (Forgetful, "list_after_write", "does not list what was just written"),
        (Unranged, "range_reads", "returns other bytes than asked for"),
    ],
)
def test_what_a_store_cannot_do_is_found_and_said(
    tmp_path: Path, kind: Callable[[str], LocalStore], lacking: str, sentence: str
) -> None:
    findings = probe(kind(str(tmp_path)))
    assert not getattr(findings, lacking)
    assert any(sentence in said and str(tmp_path) in said for said in findings.cannot), findings.cannot


def test_nothing_is_left_of_a_probe_that_finds_fault(tmp_path: Path) -> None:
    assert probe(Overwriting(str(tmp_path))).cannot
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_store_that_cannot_be_used_is_no_finding(tmp_path: Path) -> None:
    class Away(LocalStore):
        def get_range(self, key: str, offset: int, length: int) -> bytes:
            raise UnavailableError("away")

    with pytest.raises(UnavailableError):
        probe(Away(str(tmp_path)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
