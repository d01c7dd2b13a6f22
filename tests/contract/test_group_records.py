"""What ledgers do for groups, over each implementation."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from coordinator.api.app import make_api
from coordinator.api.feed import EventFeed
from coordinator.ledger import GROUP_WAKE, ConflictError, DeposedError, Ledger, NewEvent, RedisLedger, Term
from coordinator.model.epoch import Participant
from coordinator.model.errors import NotFoundError
from coordinator.model.events import EventName
from coordinator.model.group import GroupRecord, GroupSpec
from coordinator.model.job import JobSpec
from coordinator.service.control import ControlLoop
from coordinator.settings import Settings

SPEC = GroupSpec(
    repository="repo+file:///r", members=(Participant(vm="db", host="hv1", qmp="/run/db.qmp", disks=("vda",)),)
)
SHOP = GroupRecord(name="shop", spec=SPEC)
JOB = JobSpec(source="/a", target="/b")


def led(ledger: Ledger) -> Term:
    term = ledger.lead("me", 60_000)
    assert term is not None
    return term


def woken(ledger: Ledger) -> list[str]:
    found = []
    while (name := ledger.next_wake(0)) is not None:
        found.append(name)
    return found


def test_a_group_is_recorded_and_found_by_its_name(ledger: Ledger) -> None:
    kept = ledger.put_group(SHOP)
    mail = ledger.put_group(SHOP.model_copy(update={"name": "mail"}))
    assert kept == SHOP.model_copy(update={"version": 1})
    assert ledger.group("shop") == kept
    assert ledger.groups() == [mail, kept]
    with pytest.raises(NotFoundError, match="there is no group 'none'"):
        ledger.group("none")


def test_only_who_has_seen_the_last_change_of_a_group_changes_it(ledger: Ledger) -> None:
    first = ledger.put_group(SHOP)
    with pytest.raises(ConflictError, match="'shop' changed meanwhile"):
        ledger.put_group(SHOP)
    second = ledger.put_group(first.model_copy(update={"requests": ("a",)}))
    with pytest.raises(ConflictError):
        ledger.put_group(first.model_copy(update={"requests": ("b",)}))
    assert ledger.group("shop") == second
    assert second.version == 2


def test_a_change_of_a_group_wakes_the_leader_and_tells_its_events(ledger: Ledger) -> None:
    ledger.put_group(SHOP, events=[NewEvent(EventName.GROUP_ABORTED, {"group": "shop", "epoch": 3, "error": "why"})])
    assert woken(ledger) == [f"{GROUP_WAKE}shop"]
    (event,) = ledger.events()
    assert (event["event"], event["job"]) == ("GROUP_ABORTED", "")
    assert event["data"] == {"group": "shop", "epoch": 3, "error": "why"}


def test_a_coordinator_that_was_deposed_changes_no_group_and_makes_no_job(ledger: Ledger) -> None:
    old = led(ledger)
    ledger.resign(old)
    term = ledger.lead("another", 60_000)
    assert term is not None
    with pytest.raises(DeposedError):
        ledger.put_group(SHOP, term=old)
    assert ledger.groups() == []
    with pytest.raises(DeposedError):
        ledger.submit("job1", JOB, term=old)
    assert ledger.jobs() == []
    assert ledger.put_group(SHOP, term=term).version == 1
    assert ledger.submit("job1", JOB, term=term).id == "job1"
    assert ledger.submit("job1", JOB, term=term) == ledger.job("job1").job


def test_a_group_is_removed_by_who_has_seen_it_last(ledger: Ledger) -> None:
    first = ledger.put_group(SHOP)
    ledger.put_group(first)
    with pytest.raises(ConflictError):
        ledger.remove_group("shop", first.version)
    ledger.remove_group("shop", 2)
    assert ledger.groups() == []
    with pytest.raises(NotFoundError):
        ledger.remove_group("shop", 2)
    assert ledger.put_group(SHOP).version == 1


def test_jobs_are_found_by_their_names_those_that_there_are(ledger: Ledger) -> None:
    ledger.submit("job1", JOB)
    ledger.submit("job2", JOB)
    assert ledger.jobs_named(["job2", "none", "job1"]) == {name: ledger.job(name).job for name in ("job1", "job2")}
    assert ledger.jobs_named([]) == {}


@pytest.fixture(
    params=[
        "{",
        '{"name":"mail","spec":null}',
        '{"name":"mail","spec":{"repository":"tape:/r","members":[{"vm":"v","host":"h","qmp":"/q","disks":["a"]}]}}',
    ],
    ids=["damaged", "other", "refused"],
)
def with_unreadable(request: pytest.FixtureRequest, valkey_url: str) -> Iterator[RedisLedger]:
    """A ledger with the group shop, and one called mail whose record was damaged or is of another version."""
    prefix = f"{secrets.token_hex(4)}:"
    with closing(RedisLedger(valkey_url, prefix=prefix)) as ledger, closing(Redis.from_url(valkey_url)) as redis:
        ledger.put_group(SHOP)
        redis.hset(f"{prefix}group:mail", mapping={"version": 3, "record": request.param})
        redis.sadd(f"{prefix}group_names", "mail")
        yield ledger


def test_a_record_that_cannot_be_read_hides_no_other(with_unreadable: RedisLedger) -> None:
    """Of another version, say: the leader goes on, and rings for all jobs."""
    ledger = with_unreadable
    rung: list[int] = []
    control = ControlLoop(ledger, Settings(cycle_s=0.01, leader_ttl_s=5), lambda: rung.append(1))
    control.cycle()
    control.cycle()
    assert [group.name for group in ledger.groups()] == ["shop"]
    assert list(ledger.unreadable_groups()) == ["mail"]
    assert len(rung) == 2


def test_a_group_whose_record_cannot_be_read_is_listed_with_its_error_and_can_be_removed(
    with_unreadable: RedisLedger,
) -> None:
    with TestClient(make_api(with_unreadable, lambda: True, EventFeed(with_unreadable))) as api:
        listed = api.get("/v1/groups").json()
        assert [group["name"] for group in listed["groups"]] == ["shop"]
        (why,) = listed["unreadable"].values()
        answer = api.get("/v1/groups/mail")
        assert answer.json()["code"] == "damaged"
        assert answer.json()["detail"] == f"the record of group 'mail' cannot be read: {why}"
        assert api.delete("/v1/groups/mail").status_code == 204
        assert api.get("/v1/groups").json()["unreadable"] == {}
        assert api.get("/v1/groups/mail").status_code == 404
