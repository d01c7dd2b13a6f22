"""Object lock on SeaweedFS: what points lead to stays locked, what nobody needs is let go."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from coordinator.model.point import Retention
from tests.object_servers import client_of, running_seaweedfs
from tests.repositories import backup, read_point
from workers.access import Access
from workers.repository.collect import prune
from workers.repository.layout import HOLDS
from workers.repository.repository import Repository

ACCESS = Access(["/"], ["*"])


def test_a_prune_extends_the_locks_of_all_that_points_lead_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("KEY", "a passphrase")
    with running_seaweedfs() as server, closing(client_of(server)) as client:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)

        def opened(days: int, *, init: bool = False) -> Repository:
            uri = server.uri("locked", "r", f"key=env:KEY&lock-mode=GOVERNANCE&lock-days={days}")
            return Repository.init(uri, ACCESS) if init else Repository.open(uri, ACCESS)

        with opened(1, init=True) as repository:
            first = backup(repository, "shop", b"one" * 30000)
            backup(repository, "shop", b"two" * 30000)
        with opened(9) as repository:
            report = prune(repository, None, Retention(last=1))
            assert read_point(repository, "shop") == b"two" * 30000
        locked = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="locked"):
            for one in page["Contents"]:
                head = client.head_object(Bucket="locked", Key=one["Key"])
                locked[one["Key"].removeprefix("r/")] = head["ObjectLockRetainUntilDate"] - datetime.now(UTC)
        kept = {key: days > timedelta(days=8) for key, days in locked.items() if not key.startswith(HOLDS)}
        dead = {key for key, is_kept in kept.items() if not is_kept}
        assert first.members[0].root in dead
        assert len([key for key in dead if key.startswith("packs/")]) == 1
        assert all(key.startswith(("packs/", "disks/", "groups/shop/points/0000000001")) for key in dead)
        alive = {key for key, is_kept in kept.items() if is_kept}
        for prefix in ("repository.json", "keys/", "packs/", "disks/", "groups/shop/points/0000000002"):
            assert any(key.startswith(prefix) for key in alive), prefix
        assert report.locked <= len(alive)
