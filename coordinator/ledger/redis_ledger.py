"""The ledger in Redis or Valkey: one Lua script a step (scripts/), one module a kind of record."""

from __future__ import annotations

from coordinator.ledger.connection import Server
from coordinator.ledger.keys import DEFAULT_PREFIX, Keys
from coordinator.ledger.redis_epochs import RedisEpochs
from coordinator.ledger.redis_fleet import RedisEvents, RedisFleet
from coordinator.ledger.redis_groups import RedisGroups
from coordinator.ledger.redis_jobs import RedisJobs, RedisLeadership
from coordinator.ledger.redis_points import RedisPoints
from coordinator.ledger.redis_units import RedisUnits


class RedisLedger(
    RedisLeadership, RedisJobs, RedisUnits, RedisPoints, RedisGroups, RedisEpochs, RedisFleet, RedisEvents
):
    """`url` is redis://, rediss:// or unix:///path?db=0. Connects when first used."""

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        self._server = Server(url, Keys(prefix))

    def ping(self) -> None:
        with self._server.errors():
            self._server.redis.set(self._server.keys.probe, "1", ex=1)

    def shortcomings(self) -> list[str]:
        with self._server.errors():  # INFO and not CONFIG, which hosted servers refuse
            policy = self._server.redis.info("memory").get("maxmemory_policy", "noeviction")
            has_aof = self._server.redis.info("persistence").get("aof_enabled", 1)
        found = []
        if policy != "noeviction":
            found.append(f"it may evict records of jobs (maxmemory-policy {policy}): set maxmemory-policy noeviction")
        if not has_aof:
            found.append("it forgets jobs when it restarts (appendonly no): set appendonly yes")
        return found

    def close(self) -> None:
        self._server.close()
