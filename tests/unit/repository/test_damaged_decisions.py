"""A decision that cannot be read: backups pass over it, a prune stops at it until it is told to forget it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.model.errors import RefusedError
from coordinator.model.extent import BLOCK_BYTES
from coordinator.model.point import Retention
from tests.repositories import DISK, BytesSource, backup, make_repository, publish_epoch, read_point, write_epoch
from workers.repository import decisions
from workers.repository.check import check
from workers.repository.collect import prune
from workers.repository.decisions import Hold
from workers.repository.epochs import Epoch, open_epoch
from workers.repository.layout import DamageError, point_key, retained_prefix
from workers.repository.repository import Repository

ALL = Retention(last=100)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "r"


@pytest.fixture
def repository(directory: Path) -> Iterator[Repository]:
    with make_repository(directory) as made:
        yield made


def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(4 * BLOCK_BYTES)


def opened(repository: Repository, disk: str = DISK) -> Epoch:
    return open_epoch(repository, "g", disk, "job", lambda owner: True)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def with_another_seal(path: Path) -> None:
    path.write_text(path.read_text().replace('"consistency": ""', '"consistency": "crash"'))


HARMS = [truncated, with_another_seal]


def three_points_of_which_the_last_is_damaged(
    repository: Repository, directory: Path, harm: Callable[[Path], None] = truncated
) -> None:
    for seed in (1, 2, 3):
        backup(repository, "g", content(seed))
    harm(directory / point_key("g", 3))


@pytest.mark.parametrize("harm", HARMS)
def test_a_backup_passes_over_a_damaged_decision(
    repository: Repository, directory: Path, harm: Callable[[Path], None]
) -> None:
    three_points_of_which_the_last_is_damaged(repository, directory, harm)
    written = write_epoch(repository, "g", BytesSource(content(4)), "compare")
    assert (written.epoch.number, written.epoch.parent_member) == (4, repository.decisions.point("g", 2).members[0])
    publish_epoch(repository, written)
    assert read_point(repository, "g") == content(4)
    assert [damage.points for damage in check(repository, data=True).damage] == [("g@3",)]


def test_what_was_passed_over_may_have_been_newer_than_the_parent_until_there_is_another_point(
    repository: Repository, directory: Path
) -> None:
    three_points_of_which_the_last_is_damaged(repository, directory)
    first = opened(repository)
    assert (first.missed, first.may_have_newer_parent) == (3, True)
    again = opened(repository)
    assert again == first, "its planner died, and another takes its hold up"
    backup(repository, "g", content(4), "compare")
    after = opened(repository)
    assert after.parent is not None
    assert (after.parent.epoch, after.may_have_newer_parent) == (4, False)
    repository.decisions.let_go(after.hold_id)
    other = opened(repository, "another disk")
    assert (other.parent, other.missed) == (None, 3)


def test_a_group_of_which_nothing_can_be_read_begins_anew(repository: Repository, directory: Path) -> None:
    backup(repository, "g", content(1))
    truncated(directory / point_key("g", 1))
    epoch = opened(repository)
    assert (epoch.number, epoch.parent, epoch.may_have_newer_parent) == (2, None, True)


def test_the_hold_of_an_epoch_that_was_decided_by_what_is_damaged_keeps_nobody_out(
    repository: Repository, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer was killed between the manifest and letting go."""
    three_points_of_which_the_last_is_damaged(repository, directory)
    left = Hold(id="epoch-g-0000000003", kind="epoch", group="g", epoch=3, points=(2,), owner="dead", renewed_at=0.0)
    repository.decisions.hold(left)
    assert opened(repository).number == 4
    assert [hold.epoch for hold in repository.decisions.holds()] == [4]
    repository.decisions.hold(left)
    with monkeypatch.context() as patched:
        patched.setattr(decisions, "HOLD_TTL_S", 0.0)
        assert prune(repository, None, ALL, forget_damaged=True).abandoned == ["g@4"]
    assert repository.decisions.holds() == []


@pytest.mark.parametrize("harm", HARMS)
def test_a_prune_stops_at_a_damaged_decision_and_says_what_to_do(
    repository: Repository, directory: Path, harm: Callable[[Path], None]
) -> None:
    three_points_of_which_the_last_is_damaged(repository, directory, harm)
    backup(repository, "h", content(9))
    for group in ("g", "h"):  # what nothing of h leads to may be what g@3 leads to
        with pytest.raises(DamageError) as refused:
            prune(repository, (group,), Retention(last=1))
        assert point_key("g", 3) in refused.value.message
        assert "prune g --forget-damaged" in refused.value.remedy
        assert "only it leads to" in refused.value.remedy
    assert repository.decisions.group("g").present() == [1, 2, 3]
    assert list(repository.store.list("condemned/")) == []


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_damaged_decision_is_forgotten_with_what_only_it_led_to_when_it_is_asked_for(
    repository: Repository, directory: Path, harm: Callable[[Path], None], epoch: int
) -> None:
    for seed in (1, 2, 3):
        backup(repository, "g", content(seed))
    harm(directory / point_key("g", epoch))
    others = [other for other in (1, 2, 3) if other != epoch]

    told = prune(repository, None, ALL, forget_damaged=True, dry_run=True)
    assert (told.forgotten, list(told.kept["g"]), told.removed) == ({"g": [epoch]}, others[::-1], {"g": []})
    assert repository.decisions.group("g").present() == [1, 2, 3]

    assert prune(repository, None, ALL, forget_damaged=True).forgotten == {"g": [epoch]}
    assert not (directory / point_key("g", epoch)).exists()
    for _ in range(2):
        assert prune(repository, None, ALL).forgotten == {"g": []}
    found = check(repository, data=True)
    assert (found.damage, found.orphans, found.packs) == ([], 0, 2)
    for other in others:
        assert read_point(repository, "g", other) == content(other)


def test_no_epoch_is_decided_twice_and_no_bitmap_trusted_after_the_newest_decision_was_forgotten(
    repository: Repository, directory: Path
) -> None:
    three_points_of_which_the_last_is_damaged(repository, directory)
    prune(repository, None, ALL, forget_damaged=True)
    for seed in (1, 2):  # other prunes leave word of it
        backup(repository, "g", content(seed))
        prune(repository, None, Retention(last=1))
    assert repository.decisions.group("g").present() == [5]
    epoch = opened(repository)
    assert not epoch.may_have_newer_parent
    repository.decisions.let_go(epoch.hold_id)
    assert opened(repository, "a disk that g@3 may have had").may_have_newer_parent


def test_the_epoch_after_one_that_was_forgotten_has_its_number_and_an_older_parent(
    repository: Repository, directory: Path
) -> None:
    three_points_of_which_the_last_is_damaged(repository, directory)
    prune(repository, None, ALL, forget_damaged=True)
    epoch = opened(repository)
    assert epoch.parent is not None
    assert (epoch.number, epoch.parent.epoch, epoch.may_have_newer_parent) == (4, 2, True)
    assert opened(repository).may_have_newer_parent, "also to whom takes its hold up"


def test_what_somebody_reads_is_not_forgotten(repository: Repository, directory: Path) -> None:
    """He has read the decision before it was damaged; nobody else can tell what to leave him."""
    for seed in (1, 2):
        backup(repository, "g", content(seed))
    repository.decisions.hold_point("g", 1, "read-1", "me")
    truncated(directory / point_key("g", 1))
    with pytest.raises(RefusedError, match="somebody reads g@1"):
        prune(repository, None, ALL, forget_damaged=True)
    assert repository.decisions.group("g").present() == [1, 2]
    repository.decisions.let_go("read-1")
    assert prune(repository, None, ALL, forget_damaged=True).forgotten == {"g": [1]}


def test_a_damaged_record_of_what_was_retained_is_not_forgotten(repository: Repository, directory: Path) -> None:
    for seed in (1, 2):
        backup(repository, "g", content(seed))
    prune(repository, None, Retention(last=1))
    record = f"{retained_prefix('g')}0000000001.json"
    truncated(directory / record)
    with pytest.raises(DamageError, match=record):
        prune(repository, None, ALL, forget_damaged=True)
