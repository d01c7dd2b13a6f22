"""What the model of collection (tests/models) found, done to the real code step by step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.model.errors import RefusedError
from coordinator.model.extent import BLOCK_BYTES
from coordinator.model.point import Decision, Retention
from tests.repositories import (
    DISK,
    BytesSource,
    Written,
    backup,
    local_uri,
    make_repository,
    publish_epoch,
    read_point,
    write_epoch,
)
from workers.access import Access
from workers.repository import collect, compact
from workers.repository.check import check
from workers.repository.collect import forbidden_packs, prune, sentences_of
from workers.repository.decisions import Decisions
from workers.repository.epochs import open_epoch, renew
from workers.repository.index import SqliteIndex
from workers.repository.layout import GROUPS, PACKS, pack_key
from workers.repository.repository import Repository
from workers.repository.root import Root
from workers.repository.store.contract import ObjectInfo
from workers.repository.store.local import LocalStore

LAST = Retention(last=1)


def content(seed: int, blocks: int = 20) -> bytes:
    return random.Random(seed).randbytes(blocks * BLOCK_BYTES)


def first_blocks(data: bytes, blocks: int, rest: int) -> bytes:
    """The first blocks of `data`, then what else a seed makes."""
    return data[: blocks * BLOCK_BYTES] + content(rest)[blocks * BLOCK_BYTES :]


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with make_repository(tmp_path / "r") as made:
        yield made


@pytest.fixture
def elsewhere(repository: Repository, tmp_path: Path) -> Iterator[Repository]:
    """The same repository, opened by another process."""
    with Repository.open(local_uri(tmp_path / "r"), Access(["/"], [])) as opened:
        yield opened


def indexed(repository: Repository, group: str, data: bytes, kind: str = "full") -> Written:
    path = Path(repository.store.name.removeprefix("repo+file://")).parent / "index"
    index = SqliteIndex(
        path, forbidden_packs(repository), lambda pack: repository.store.size(pack_key(pack)) is not None
    )
    return write_epoch(repository, group, BytesSource(data), kind, index=index)


def prune_thrice(repository: Repository) -> None:
    for _ in range(3):
        prune(repository, None, LAST)


def once(act: Callable[[], None]) -> Callable[[], None]:
    """`act`, when it is called first."""
    todo = [act]

    def called() -> None:
        if todo:
            todo.pop()()

    return called


def before(monkeypatch: pytest.MonkeyPatch, where: object, name: str, act: Callable[[], None]) -> None:
    """Do `act` before the first call of a function."""
    called, first = getattr(where, name), once(act)

    def wrapped(*args: Any, **named: Any) -> Any:
        first()
        return called(*args, **named)

    monkeypatch.setattr(where, name, wrapped)


def test_a_point_held_just_before_a_prune_drops_it_can_be_read_to_the_end(
    repository: Repository, elsewhere: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prune has looked at the holds already; the reader sees the point still there."""
    backup(repository, "g", content(1))
    backup(repository, "g", content(2))
    held: list[Decision] = []
    before(
        monkeypatch, Decisions, "retain", lambda: held.append(elsewhere.decisions.hold_point("g", 1, "read-1", "me")[0])
    )
    prune_thrice(repository)
    disk = elsewhere.disk(held[0], "")
    found = bytearray(disk.size)
    disk.read_into(0, memoryview(found))
    assert found == content(1)


def test_compaction_counts_what_is_published_while_it_reads_manifests(
    repository: Repository, elsewhere: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whose parent, which it had listed, is pruned before its manifest was read."""
    publish_epoch(repository, indexed(repository, "a", content(1)))
    publish_epoch(repository, indexed(repository, "z", content(3)[: 10 * BLOCK_BYTES] + content(1)[-4 * BLOCK_BYTES :]))
    publish_epoch(repository, indexed(repository, "a", first_blocks(content(1), 2, 2), "compare"))
    prune(repository, ("a",), LAST)
    newer = content(4, 1) + content(3)[BLOCK_BYTES : 10 * BLOCK_BYTES] + content(1)[-4 * BLOCK_BYTES :]

    def meanwhile() -> None:
        backup(elsewhere, "z", newer, "compare")
        prune(elsewhere, ("z",), LAST)

    def moving() -> None:
        before(monkeypatch, Decisions, "points_to_keep", meanwhile)

    before(monkeypatch, compact, "_live", lambda: before(monkeypatch, compact, "_live", moving))
    assert compact.compact(repository).moved_packs == 1
    prune_thrice(repository)
    assert check(repository, data=True).damage == []
    assert read_point(repository, "z") == newer


def test_a_point_published_while_groups_are_listed_is_not_forgotten(
    repository: Repository, elsewhere: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another prune has kept it, and so a retention record is listed that knows more than the points listed before."""
    for seed in (1, 2, 3, 4):
        backup(repository, "g", content(seed, 2))
    prune(repository, None, Retention(last=3))

    def meanwhile() -> None:
        backup(elsewhere, "g", content(5, 2))
        prune(elsewhere, None, Retention(last=3))

    listed, act = LocalStore.list, once(meanwhile)

    def listing(store: LocalStore, prefix: str) -> Iterator[ObjectInfo]:
        for info in listed(store, prefix):
            yield info
            if prefix == GROUPS and info.key.endswith("points/0000000004.json"):
                act()

    monkeypatch.setattr(LocalStore, "list", listing)
    prune(repository, None, LAST)
    assert read_point(repository, "g") == content(5, 2)


def test_a_pack_that_one_compaction_moves_is_not_given_free_by_another(
    repository: Repository, elsewhere: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds nothing alive in it any more; a writer then refers to what the first has left behind."""
    publish_epoch(repository, indexed(repository, "g", content(1)))
    publish_epoch(repository, indexed(repository, "g", first_blocks(content(1), 2, 2), "compare"))
    prune(repository, None, LAST)

    def late() -> None:
        compact.compact(elsewhere)
        twins.append(indexed(elsewhere, "h", content(1)))

    def meanwhile() -> None:
        backup(elsewhere, "g", content(5))
        before(monkeypatch, collect, "condemn", late)
        prune(elsewhere, None, LAST)
        publish_epoch(elsewhere, twins[0])

    twins: list[Written] = []
    before(monkeypatch, compact._Mover, "finish", meanwhile)
    compact.compact(repository)
    prune_thrice(repository)
    assert check(repository, data=True).damage == []
    assert read_point(repository, "h") == content(1)


def test_an_epoch_that_was_announced_and_taken_back_keeps_nothing_from_being_removed(
    repository: Repository, elsewhere: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(repository, "g", content(1))
    backup(repository, "g", content(2))
    announced = open_epoch(elsewhere, "g", "disk", "somebody", lambda owner: True)
    before(monkeypatch, collect, "bound", lambda: None)
    prune(repository, None, LAST)
    elsewhere.decisions.let_go(announced.hold_id)
    prune_thrice(repository)
    assert check(repository).orphans == 0
    assert list(sentences_of(repository)) == []


def test_two_prunes_at_once_do_not_stumble_over_each_other(
    repository: Repository, elsewhere: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one has listed, the other has removed."""
    for seed in (1, 2):
        write_epoch(repository, "g", BytesSource(content(seed)), "full")
    backup(repository, "g", content(3))
    listed = LocalStore.list

    def meanwhile() -> None:
        prune_thrice(elsewhere)

    act = once(meanwhile)

    def listing(store: LocalStore, prefix: str) -> Iterator[ObjectInfo]:
        found = list(listed(store, prefix))
        if prefix == PACKS and store is repository.store:
            act()
        yield from found

    monkeypatch.setattr(LocalStore, "list", listing)
    prune(repository, None, LAST)
    assert read_point(repository, "g") == content(3)


def test_an_epoch_whose_hold_was_removed_by_hand_publishes_nothing(
    repository: Repository, elsewhere: Repository
) -> None:
    """As the refusal of a second writer advises, if the first is dead. It was only asleep, and what it refers to may be
    gone: whoever removes something waits for no epoch without a hold."""
    publish_epoch(repository, indexed(repository, "g", content(1)))
    written = indexed(repository, "h", content(1))
    backup(elsewhere, "g", content(2))
    prune(elsewhere, None, LAST)
    elsewhere.decisions.let_go(written.epoch.hold_id)
    prune_thrice(elsewhere)
    with pytest.raises(RefusedError, match="the hold of epoch 1 of group 'h' was removed"):
        renew(repository, written.epoch)
    with pytest.raises(RefusedError, match="the hold of epoch 1 of group 'h' was removed"):
        publish_epoch(repository, written)
    assert check(repository, data=True).damage == []
    assert repository.decisions.group("h").present() == []


def test_who_wakes_when_another_writes_its_epoch_leaves_the_others_hold_alone(
    repository: Repository, elsewhere: Repository
) -> None:
    asleep = open_epoch(repository, "g", DISK, "job 1 on here", lambda owner: False)
    elsewhere.decisions.let_go(asleep.hold_id)
    awake = open_epoch(elsewhere, "g", DISK, "job 2 on there", lambda owner: False)
    assert awake.number == asleep.number
    with pytest.raises(RefusedError, match="is now job 2 on there's"):
        renew(repository, asleep)
    renew(elsewhere, awake)
    assert [hold.owner for hold in repository.decisions.holds()] == ["job 2 on there"]


def test_a_job_goes_on_with_its_epoch_on_another_host_and_a_second_one_is_told_where_it_is(
    repository: Repository,
) -> None:
    first = open_epoch(repository, "g", DISK, "job 1 on here", lambda owner: False)
    again = open_epoch(repository, "g", DISK, "job 1 on there", lambda owner: False)
    assert (again.number, again.hold_id) == (first.number, first.hold_id)
    renew(repository, again)
    with pytest.raises(RefusedError, match="job 1 on there is writing epoch 1 of group 'g'"):
        open_epoch(repository, "g", DISK, "job 12 on there", lambda owner: False)


def test_a_check_takes_nothing_for_damaged_that_is_pruned_while_it_looks(
    repository: Repository, elsewhere: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --data it looks for hours."""
    for seed in (1, 2, 3):
        backup(repository, "g", content(seed))
    root = elsewhere.decisions.point("g", 3).members[0].root
    before(monkeypatch, Root, "page", lambda: prune_thrice(elsewhere))
    assert check(repository, data=True).damage == []
    elsewhere.store.delete([root])
    assert [damage.points for damage in check(repository).damage] == [("g@3",)]
