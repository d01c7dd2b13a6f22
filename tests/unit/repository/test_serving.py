"""What a server of recovery points does when its host fails it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.errors import DiskIOError
from tests.repositories import backup, make_repository
from workers.repository.served_point import Overlay


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    with make_repository(tmp_path / "r") as repository:
        point = backup(repository, "g", b"x" * 200_000)
        made = Overlay(repository.disk(point, ""), tmp_path, "g@1", "identity")
        yield made
        made.close()


def test_after_a_flush_that_failed_no_other_succeeds(overlay: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has told of the lost writes, and tells nobody again; a guest paused by werror=stop flushes again."""
    overlay.write(0, memoryview(b"y" * 100))

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(DiskIOError, match="Input/output error"):
            overlay.flush()
    with pytest.raises(DiskIOError, match="an earlier flush failed"):
        overlay.flush()
