"""Object lock on SeaweedFS: what points lead to stays locked, what nobody needs is let go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from coordinator.model.point import Retention
from tests.object_servers import ObjectServer, client_of, running_seaweedfs
from tests.repositories import backup, read_point
from workers.access import Access
from workers.repository.collect import prune
from workers.repository.layout import HOLDS, DamageError
from workers.repository.repository import Repository

ACCESS = Access(["/"], ["*"])


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with running_seaweedfs() as running, closing(client_of(running)) as client:
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        yield running


class Place:
    """A repository of its own in the locked bucket."""

    def __init__(self, server: ObjectServer, prefix: str) -> None:
        self._server = server
        self._prefix = prefix

    def opened(self, days: int, *, init: bool = False) -> Repository:
        uri = self._server.uri("locked", self._prefix, f"key=env:KEY&lock-mode=GOVERNANCE&lock-days={days}")
        return Repository.init(uri, ACCESS) if init else Repository.open(uri, ACCESS)

    def locks(self) -> dict[str, timedelta]:
        """How long each object is locked from now, without holds."""
        found = {}
        with closing(client_of(self._server)) as client:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket="locked", Prefix=f"{self._prefix}/"):
                for one in page["Contents"]:
                    key = one["Key"].removeprefix(f"{self._prefix}/")
                    head = client.head_object(Bucket="locked", Key=one["Key"])
                    if not key.startswith(HOLDS):
                        found[key] = head["ObjectLockRetainUntilDate"] - datetime.now(UTC)
        return found


@pytest.fixture
def place(server: ObjectServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Place:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    for name, value in {**server.env, "KEY": "a passphrase"}.items():
        monkeypatch.setenv(name, value)
    return Place(server, request.node.name)


def test_a_prune_extends_the_locks_of_all_that_points_lead_to_and_no_others(place: Place) -> None:
    with place.opened(1, init=True) as repository:
        first = backup(repository, "shop", b"one" * 30000)
        backup(repository, "shop", b"two" * 30000)
    with place.opened(9) as repository:
        report = prune(repository, None, Retention(last=1))
        assert read_point(repository, "shop") == b"two" * 30000
    kept = {key: left > timedelta(days=8) for key, left in place.locks().items()}
    dead = {key for key, is_kept in kept.items() if not is_kept}
    assert first.members[0].root in dead
    assert len([key for key in dead if key.startswith("packs/")]) == 1
    assert all(key.startswith(("packs/", "disks/", "groups/shop/points/0000000001")) for key in dead)
    alive = {key for key, is_kept in kept.items() if is_kept}
    for prefix in ("repository.json", "keys/", "packs/", "disks/", "groups/shop/points/0000000002"):
        assert any(key.startswith(prefix) for key in alive), prefix
    assert 0 < report.locked <= len(alive)


def test_a_lock_that_reaches_further_already_stays_and_is_no_error(place: Place) -> None:
    with place.opened(9, init=True) as repository:
        backup(repository, "shop", b"one" * 30000)
    with place.opened(1) as repository:
        prune(repository, None, Retention(last=1))
    locks = place.locks()
    assert all(left > timedelta(days=8) for key, left in locks.items() if not key.startswith("groups/shop/retained"))


def test_what_is_damaged_keeps_nothing_else_from_being_locked(place: Place) -> None:
    with place.opened(1, init=True) as repository:
        good = backup(repository, "good", b"one" * 30000)
        bad = backup(repository, "bad", b"two" * 30000)
        repository.store.put(bad.members[0].root, b"no root")
    with place.opened(9) as repository, pytest.raises(DamageError, match="bad"):
        prune(repository, None, Retention(last=1))
    locks = place.locks()
    for key in ("repository.json", good.members[0].root, "groups/good/points/0000000001.json"):
        assert locks[key] > timedelta(days=8), key
    assert sum(left > timedelta(days=8) for key, left in locks.items() if key.startswith("packs/")) == 1


def test_a_damaged_decision_keeps_nothing_else_from_being_locked(place: Place) -> None:
    """A prune ends at it, and so lets nothing go."""
    with place.opened(1, init=True) as repository:
        for text in (b"one", b"two"):
            point = backup(repository, "shop", text * 30000)
        repository.store.put("groups/shop/points/0000000001.json", b"no decision")
    with place.opened(9) as repository, pytest.raises(DamageError, match="0000000001"):
        prune(repository, None, Retention(last=1))
    locks = place.locks()
    for key in ("repository.json", point.members[0].root, "groups/shop/points/0000000002.json"):
        assert locks[key] > timedelta(days=8), key
