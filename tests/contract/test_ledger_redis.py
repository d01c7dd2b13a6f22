"""What only the ledger in Redis promises: errors of its server, forks, what it leaves behind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from coordinator.ledger import NewUnit, RedisLedger, Term, open_ledger
from coordinator.model.errors import UnavailableError, UsageError
from coordinator.model.extent import Extent, Status
from coordinator.model.job import JobSpec, State
from coordinator.model.units import Claim, PlannedUnit, UnitKind
from tests.contract.conftest import ValkeyServer

SPEC = JobSpec(source="/a", target="/b")
HOUR_MS = 3_600_000


@pytest.fixture
def server(valkey_url: str) -> Iterator[Redis]:
    with closing(Redis.from_url(valkey_url, decode_responses=True)) as client:
        yield client


@pytest.fixture
def prefix() -> str:
    return f"{secrets.token_hex(4)}:"


@pytest.fixture
def ledger(valkey_url: str, prefix: str) -> Iterator[RedisLedger]:
    with closing(open_ledger(valkey_url, prefix)) as made:
        yield made


def plan(ledger: RedisLedger, units: int) -> Term:
    term = ledger.lead("leader", HOUR_MS)
    assert term is not None
    ledger.adopt_run(term, 0)
    ledger.submit("job", SPEC)
    ledger.update("job", 1, {"state": State.RUNNING}, new_unit=NewUnit(UnitKind.PLAN, 1))
    claim = ledger.claim("worker", "plan", HOUR_MS)
    assert claim is not None
    planned = [PlannedUnit(n, n + 1, (Extent(n, 1, Status.DATA),)) for n in range(units)]
    assert ledger.add_units("job", claim.unit_id, "plan", UnitKind.COPY, 0, units, planned)
    return term


def test_no_server_is_unavailable_and_says_which(tmp_path: Path) -> None:
    with closing(open_ledger(f"unix://{tmp_path}/none.sock")) as ledger:
        for step in (ledger.ping, lambda: ledger.job("job"), lambda: ledger.claim("w", "t", 1)):
            with pytest.raises(UnavailableError, match=r"none\.sock"):
                step()


def test_a_url_of_something_else_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="amqp"):
        open_ledger("amqp://user:secret@host")


def test_a_password_is_never_shown() -> None:
    with (
        closing(open_ledger("redis://user:secret@127.0.0.1:1/0")) as ledger,
        pytest.raises(UnavailableError) as raised,
    ):
        ledger.ping()
    assert "secret" not in str(raised.value)


def test_a_full_memory_is_unavailable_and_changes_nothing(server: Redis, ledger: RedisLedger) -> None:
    ledger.submit("job", SPEC)
    before = ledger.job("job")
    server.config_set("maxmemory", "1")
    try:
        steps = (
            ledger.ping,
            lambda: ledger.submit("other", SPEC),
            lambda: ledger.update("job", 1, {"speed": 1}),
        )
        for step in steps:
            with pytest.raises(UnavailableError, match="out of memory"):
                step()
        assert ledger.job("job") == before
    finally:
        server.config_set("maxmemory", "0")


def test_a_server_that_may_evict_or_forget_says_so_with_what_to_do(own_valkey: ValkeyServer) -> None:
    with (
        closing(Redis.from_url(own_valkey.url)) as server,
        closing(open_ledger(own_valkey.url)) as ledger,
    ):
        server.config_set("maxmemory-policy", "allkeys-lru")
        server.config_set("appendonly", "no")
        evicts, forgets = ledger.shortcomings()
    assert "allkeys-lru" in evicts
    assert "set maxmemory-policy noeviction" in evicts
    assert "set appendonly yes" in forgets


def test_a_server_that_forgot_the_scripts_is_taught_again(server: Redis, ledger: RedisLedger) -> None:
    ledger.submit("job", SPEC)
    server.script_flush()
    assert ledger.update("job", 1, {"speed": 3}).speed == 3
    server.script_flush()
    ledger.submit("other", SPEC)


def test_it_can_be_used_on_both_sides_of_a_fork(ledger: RedisLedger) -> None:
    plan(ledger, 50)
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(BaseException):
            claims = [ledger.claim("child", f"child{n}", HOUR_MS) for n in range(20)]
            status = 0 if all(c and c.token == f"child{n}" for n, c in enumerate(claims)) else 2
        os._exit(status)
    for n in range(20):
        claim = ledger.claim("parent", f"parent{n}", HOUR_MS)
        assert claim is not None
        assert claim.token == f"parent{n}"
        assert ledger.renew("job", claim.unit_id, claim.token, HOUR_MS).held
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ledger.job("job").job.units_leased == 41


def test_a_server_without_append_only_file_takes_jobs(server: Redis, ledger: RedisLedger) -> None:
    server.config_set("appendonly", "no")
    try:
        assert ledger.submit("job", SPEC).id == "job"
    finally:
        server.config_set("appendonly", "yes")


def test_forgotten_units_are_swept_in_batches(
    server: Redis, ledger: RedisLedger, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.ledger.redis_units.SWEEP_UNITS", 10)
    term = plan(ledger, 35)
    ledger.update("job", ledger.job("job").version, {}, drop_units=True, term=term)

    def left() -> int:
        return len(list(server.scan_iter(f"{prefix}unit:*", count=1000)))

    counts = [left()]
    while counts[-1] and len(counts) < 10:
        ledger.reap(term, 0)
        counts.append(left())
    assert counts == [35, 26, 16, 6, 0]
    assert not server.exists(f"{prefix}trash")


def test_records_of_done_units_are_kept_while_an_older_lease_lasts_and_no_longer(
    server: Redis, ledger: RedisLedger, prefix: str
) -> None:
    """The plan still streams: its lease, however long, keeps none."""
    plan(ledger, 6)

    def claimed(token: str) -> Claim:
        held = ledger.claim("worker", token, HOUR_MS)
        assert held is not None
        return held

    def records() -> int:
        return len(list(server.scan_iter(f"{prefix}unit:*", count=1000)))

    before = records()
    ledger.finish("job", claimed("alone").unit_id, "alone")
    assert records() == before - 1
    old = claimed("old")
    for n in range(3):
        ledger.finish("job", claimed(f"t{n}").unit_id, f"t{n}")
    assert records() == before - 1
    young = claimed("young")
    ledger.finish("job", old.unit_id, "old")
    assert records() == before - 4, "only what was finished since the young one was claimed may still be lost"
    ledger.finish("job", young.unit_id, "young")
    assert records() == before - 6
    assert not server.exists(f"{prefix}recent:job")


def test_a_dismissed_job_leaves_nothing_behind(server: Redis, ledger: RedisLedger, prefix: str) -> None:
    term = plan(ledger, 3)
    ledger.take("job", 10, 10, 10)
    ledger.update("job", ledger.job("job").version, {"state": State.CONCLUDED})
    ledger.dismiss("job", ledger.job("job").version)
    ledger.reap(term, 0)
    names: Any = server.scan_iter(f"{prefix}*", count=1000)
    kept = {"leader", "run", "hold", "incarnations", "turn", "events"}
    assert {name.removeprefix(prefix) for name in names} == kept
