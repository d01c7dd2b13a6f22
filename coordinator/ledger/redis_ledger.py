"""The ledger in Redis or Valkey: one Lua script a step (scripts/), one module a kind of record."""

from __future__ import annotations

from coordinator.ledger.connection import Server
from coordinator.ledger.keys import DEFAULT_PREFIX, Keys
from coordinator.ledger.redis_fleet import RedisEvents, RedisFleet
from coordinator.ledger.redis_jobs import RedisJobs, RedisLeadership
from coordinator.ledger.redis_units import RedisUnits


class RedisLedger(RedisLeadership, RedisJobs, RedisUnits, RedisFleet, RedisEvents):
    """`url` is redis://, rediss:// or unix:///path?db=0. Connects when first used."""

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        self._server = Server(url, Keys(prefix))

    def ping(self) -> None:
        with self._server.errors():
            self._server.redis.set(self._server.keys.probe, "1", ex=1)

    def close(self) -> None:
        self._server.close()
