"""Collection beside writers: nothing goes that somebody may still refer to (DESIGN, retention)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.extent import BLOCK_BYTES
from coordinator.model.point import Decision, Retention, SeedMember
from coordinator.model.repository_uri import LATEST
from tests.repositories import (
    BytesSource,
    backup,
    make_repository,
    publish_epoch,
    publish_members,
    read_point,
    write_epoch,
    write_member,
)
from workers.repository import collect, decisions
from workers.repository.check import check
from workers.repository.collect import forbidden_packs, prune, sentences_of
from workers.repository.compact import compact
from workers.repository.index import SqliteIndex
from workers.repository.keyring import Keyring
from workers.repository.layout import pack_key
from workers.repository.pack import Contents, PackRef, read_contents
from workers.repository.repository import Repository
from workers.repository.store.contract import ObjectStore

LAST = Retention(last=1)


def content(seed: int, blocks: int = 20) -> bytes:
    return random.Random(seed).randbytes(blocks * BLOCK_BYTES)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with make_repository(tmp_path / "r") as made:
        yield made


@pytest.fixture
def index_path(tmp_path: Path) -> Path:
    return tmp_path / "index"


def index_of(repository: Repository, path: Path) -> SqliteIndex:
    """As a writer opens it, after its hold is there."""
    return SqliteIndex(
        path, forbidden_packs(repository), lambda pack: repository.store.size(pack_key(pack)) is not None
    )


def indexed_backup(repository: Repository, group: str, data: bytes, path: Path) -> None:
    publish_epoch(
        repository, write_epoch(repository, group, BytesSource(data), "full", index=index_of(repository, path))
    )


def test_equal_blocks_of_another_disk_are_found_by_the_index(repository: Repository, index_path: Path) -> None:
    indexed_backup(repository, "one", content(1), index_path)
    twin = write_epoch(repository, "two", BytesSource(content(1)), "full", index=index_of(repository, index_path))
    assert twin.sent == 0
    publish_epoch(repository, twin)
    assert read_point(repository, "two") == content(1)


def test_what_a_writer_may_refer_to_that_was_open_before_stays_until_it_has_decided(
    repository: Repository, index_path: Path
) -> None:
    indexed_backup(repository, "one", content(1), index_path)
    sleeping = write_epoch(repository, "two", BytesSource(content(1)), "full", index=index_of(repository, index_path))
    assert sleeping.sent == 0
    backup(repository, "one", content(2))
    for _ in range(3):  # condemns what only one@1 led to, and would remove it
        prune(repository, ("one",), LAST)
    publish_epoch(repository, sleeping)
    for _ in range(3):
        prune(repository, None, LAST)
    assert read_point(repository, "two") == content(1)


def test_a_writer_that_comes_later_refers_to_nothing_condemned(repository: Repository, index_path: Path) -> None:
    indexed_backup(repository, "one", content(1), index_path)
    backup(repository, "one", content(2))
    prune(repository, None, LAST)  # condemns
    late = write_epoch(repository, "two", BytesSource(content(1)), "full", index=index_of(repository, index_path))
    assert late.sent == len(content(1))
    prune(repository, None, LAST)  # removes
    publish_epoch(repository, late)
    assert read_point(repository, "two") == content(1)


def test_what_was_moved_twice_is_found_where_it_went(repository: Repository) -> None:
    """The second compaction has to count what the first brought there for packs that are gone."""
    for seed in (1, 2):
        backup(repository, f"g{seed}", content(seed))
    for _ in range(2):
        compact(repository, live_share=1.1)
        for _ in range(3):
            prune(repository, None, LAST)
    moved = [info.key for info in repository.store.list("moved/")]
    assert len(moved) > 2
    for seed in (1, 2):
        assert read_point(repository, f"g{seed}") == content(seed)


def test_the_newest_point_and_those_in_use_are_never_pruned(repository: Repository) -> None:
    for seed in range(4):
        backup(repository, "g", content(seed, 2))
    open_over_newest = write_epoch(repository, "g", BytesSource(content(9, 2)), "full")
    report = prune(repository, None, LAST)
    assert report.removed["g"] == [1, 2, 3]
    assert "held" in report.kept["g"][4]
    publish_epoch(repository, open_over_newest)
    assert read_point(repository, "g") == content(9, 2)


def test_the_index_leads_to_nothing_in_a_pack_that_was_moved(repository: Repository, index_path: Path) -> None:
    """What was dead in it when it was moved did not go along, though the old pack may still be there."""
    indexed_backup(repository, "g", content(1), index_path)
    kept = content(1)[: 2 * BLOCK_BYTES] + content(2)[2 * BLOCK_BYTES :]
    publish_epoch(repository, write_epoch(repository, "g", BytesSource(kept), "compare"))
    prune(repository, None, LAST)
    assert compact(repository).moved_packs == 1
    again = write_epoch(repository, "h", BytesSource(content(1)), "full", index=index_of(repository, index_path))
    publish_epoch(repository, again)
    for _ in range(3):
        prune(repository, None, LAST)
    assert check(repository, data=True).damage == []
    assert read_point(repository, "h") == content(1)


def test_a_compaction_that_was_given_up_writes_no_word_of_where_things_went(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(repository, "g", content(1))
    kept = content(1)[: 2 * BLOCK_BYTES] + content(2)[2 * BLOCK_BYTES :]
    publish_epoch(repository, write_epoch(repository, "g", BytesSource(kept), "compare"))
    prune(repository, None, LAST)

    def silent_for_long(point: str) -> None:
        if point == "between-packs-and-moved":
            with monkeypatch.context() as patched:
                patched.setattr(decisions, "HOLD_TTL_S", 0.0)
                for _ in range(2):
                    prune(repository, None, LAST)

    monkeypatch.setattr("workers.repository.compact.pass_point", silent_for_long)
    with pytest.raises(RefusedError, match="given up"):
        compact(repository)
    for _ in range(3):
        prune(repository, None, LAST)
    assert read_point(repository, "g") == kept


def test_an_epoch_that_is_published_while_a_prune_looks_keeps_what_it_refers_to(
    repository: Repository, index_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prune before it was killed between its record and the look at who is open."""
    indexed_backup(repository, "one", content(1), index_path)
    indexed_backup(repository, "one", content(2), index_path)
    sleeping = write_epoch(repository, "two", BytesSource(content(1)), "full", index=index_of(repository, index_path))
    assert sleeping.sent == 0

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(collect, "bound", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(repository, None, LAST)

    found = collect.find_alive

    def published_meanwhile(*arguments: Any) -> Any:
        alive = found(*arguments)
        if not repository.decisions.group("two").decided:
            publish_epoch(repository, sleeping)
        return alive

    monkeypatch.setattr(collect, "find_alive", published_meanwhile)
    for _ in range(3):
        prune(repository, None, LAST)
    assert read_point(repository, "two") == content(1)


def test_an_epoch_that_was_abandoned_and_pruned_is_not_said_to_be_published(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(repository, "g", content(1, 2))
    sleeping = write_epoch(repository, "g", BytesSource(content(2, 2)), "full")
    with monkeypatch.context() as patched:
        patched.setattr(decisions, "HOLD_TTL_S", 0.0)
        prune(repository, None, LAST)
    with pytest.raises(RefusedError, match="given up"):
        publish_epoch(repository, sleeping)
    assert repository.decisions.point("g", 0).epoch == 1


def test_compaction_moves_no_damage(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", content(1))
        (pack,) = repository.store.list("packs/")
        path = tmp_path / "r" / pack.key
        broken = bytearray(path.read_bytes())
        broken[1000] ^= 1
        path.write_bytes(broken)
        assert compact(repository, live_share=1.1).moved_packs == 0
        assert any(pack.key in damage.message for damage in check(repository, data=True).damage)
        assert [s.keys for _, s in sentences_of(repository)] == [(pack.key,)], "nobody is to refer to it any more"


def test_a_prune_of_a_group_that_there_is_not_is_no_success(tmp_path: Path) -> None:
    """Who has mistyped its name would believe that its points are pruned."""
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "shop", b"x" * 1000)
        for dry_run in (False, True):
            with pytest.raises(NotFoundError, match="there is no group 'shpo'") as caught:
                prune(repository, ("shop", "shpo"), Retention(last=1), dry_run=dry_run)
            assert caught.value.remedy == "it has: shop"


def test_a_footer_that_is_silent_about_a_run_does_not_cost_it(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only compaction reads the runs of a footer: a flipped bit in it is felt by nobody before."""
    backup(repository, "g", content(1))
    kept = content(1)[: 2 * BLOCK_BYTES] + content(2)[2 * BLOCK_BYTES :]
    backup(repository, "g", kept, "compare")
    prune(repository, None, LAST)

    def rotten(store: ObjectStore, keyring: Keyring, ref: PackRef) -> Contents:
        whole = read_contents(store, keyring, ref)
        first, *others = whole.runs
        return replace(whole, runs=(replace(first, offset=first.offset ^ 1), *others))

    monkeypatch.setattr("workers.repository.compact.read_contents", rotten)
    assert compact(repository).moved_packs == 0
    for _ in range(3):
        prune(repository, None, LAST)
    assert read_point(repository, "g") == kept


def seed(repository: Repository, group: str, data: bytes, seeded: int) -> Decision:
    """A step on the way to a point: the first bytes of a disk."""
    written = write_epoch(repository, group, BytesSource(data[:seeded] + bytes(len(data) - seeded)), "full")
    part = SeedMember(**write_member(repository, written).model_dump(), seeded=seeded)
    return publish_members(repository, written.epoch, (), seeding=(part,))


def test_what_was_seeded_is_kept_for_the_next_step_and_is_no_point(repository: Repository) -> None:
    data = content(1)
    first = seed(repository, "g", data, 8 * BLOCK_BYTES)
    second = seed(repository, "g", data, 16 * BLOCK_BYTES)
    assert second.base("disk") is not None
    assert second.seeding[0].parent == first.epoch
    assert prune(repository, None, LAST).removed["g"] == [first.epoch]
    for _ in range(2):
        prune(repository, None, LAST)
    assert check(repository, data=True).damage == []
    with pytest.raises(NotFoundError, match="has no recovery point"):
        repository.decisions.point("g", LATEST)
    with pytest.raises(NotFoundError, match="has no disk 'disk'"):
        repository.disk(repository.decisions.point("g", second.epoch), "disk")
    written = write_epoch(repository, "g", BytesSource(data), "full")
    assert written.sent == 4 * BLOCK_BYTES, "of what was seeded nothing is sent again"
    whole = publish_epoch(repository, written)
    assert prune(repository, None, LAST).removed["g"] == [second.epoch]
    assert repository.decisions.point("g", LATEST).epoch == whole.epoch
    assert read_point(repository, "g") == data


def test_the_last_point_of_a_disk_that_is_seeded_anew_stays(repository: Repository) -> None:
    whole = backup(repository, "g", content(1))
    backup(repository, "g", content(2))
    lost = seed(repository, "g", content(3), 4 * BLOCK_BYTES)
    report = prune(repository, None, LAST)
    assert report.removed["g"] == [whole.epoch]
    assert set(report.kept["g"]) == {whole.epoch + 1, lost.epoch}
    assert repository.decisions.point("g", LATEST).epoch == whole.epoch + 1
    assert read_point(repository, "g") == content(2)
