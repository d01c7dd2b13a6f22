"""Kill -9 at named points of a backup, a prune and a compaction: the repository stays readable, nothing published is
lost, and what is left over goes with the next prunes (I3)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.model.extent import BLOCK_BYTES
from coordinator.model.point import Retention
from tests.repositories import backup, local_uri, make_repository, read_point
from workers.access import Access
from workers.repository import decisions
from workers.repository.check import check
from workers.repository.collect import prune, sentences_of
from workers.repository.compact import compact
from workers.repository.repository import Repository

SIZE = 40 * BLOCK_BYTES
EPOCHS = (1, 2, 3, 4)


def content(epoch: int) -> bytes:
    """Some blocks are those of the epoch before, some are new and do not compress."""
    data = bytearray(SIZE)
    for number in range(1, epoch + 1):
        dice = random.Random(number)
        for block in dice.sample(range(40), 12):
            data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = dice.randbytes(BLOCK_BYTES)
    return bytes(data)


def act(directory: str, action: str) -> None:
    """What the process that is killed does; run by `python -m`."""
    with Repository.open(local_uri(Path(directory)), Access(["/"], [])) as repository:
        if action == "backup":
            backup(repository, "g", content(5), "compare")
        elif action == "prune":
            prune(repository, None, Retention(last=2))
        else:
            compact(repository, live_share=1.0)


@pytest.mark.parametrize(
    ("action", "point"),
    [
        ("backup", "before-pack"),
        ("backup", "between-packs-and-root"),
        ("backup", "between-root-and-manifest"),
        ("backup", "after-manifest"),
        ("prune", "after-retain"),
        ("prune", "between-condemned-and-bound"),
        ("prune", "between-removed-and-record"),
        ("compact", "between-condemned-and-bound"),
        ("compact", "between-packs-and-moved"),
        ("compact", "between-moved-and-moved"),
    ],
)
def test_nothing_published_is_lost_and_the_next_runs_clean_up(
    tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, point: str
) -> None:
    directory, marker = tmpfs_path / "r", tmpfs_path / "passed"
    with make_repository(directory) as repository:
        for epoch in EPOCHS:
            backup(repository, "g", content(epoch), "compare")
        if point == "between-removed-and-record":  # something that may be removed has to be there
            prune(repository, None, Retention(last=3))
    command = [
        sys.executable,
        "-c",
        f"from tests.fault.test_repository_kills import act; act({str(directory)!r}, {action!r})",
    ]
    environment = {**os.environ, "FLUSHPOINT_FAILPOINT": f"{point}:kill:{marker}"}
    done = subprocess.run(command, env=environment, timeout=60, check=False, capture_output=True, text=True)
    assert marker.exists(), done.stderr
    assert done.returncode == -signal.SIGKILL

    with Repository.open(local_uri(directory), Access(["/"], [])) as repository:
        assert check(repository, data=True).damage == []
        published = [p.epoch for p in repository.decisions.points(repository.decisions.group("g"))]
        assert published[-1] == (5 if point == "after-manifest" else 4)
        for epoch in published:
            assert read_point(repository, "g", epoch) == content(epoch)
        # The next writer goes on, and prunes remove what was left over, when the dead have been silent for long enough.
        monkeypatch.setattr(decisions, "HOLD_TTL_S", 0.0)
        backup(repository, "g", content(6), "compare")
        prune(repository, None, Retention(last=1))
        compact(repository, live_share=1.0)
        for _ in range(3):
            prune(repository, None, Retention(last=1))
        report = check(repository, data=True)
        assert (report.damage, report.orphans) == ([], 0)
        assert read_point(repository, "g") == content(6)
        assert [s for _, s in sentences_of(repository)] == []
        assert list(repository.store.list("holds/")) == []
