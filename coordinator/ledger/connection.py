"""The connection to the server: scripts by name, errors by what to do about them.

Nothing here retries a step that changes something: whoever lost the answer asks again with the same token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from redis import Redis
from redis import asyncio as async_redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from coordinator.ledger.contract import LedgerUnavailableError
from coordinator.ledger.keys import Keys
from coordinator.model.errors import FlushpointError, UsageError

SOCKET_TIMEOUT_S = 20.0
BLOCK_S = 5.0
"""Longest single blocking command: far below SOCKET_TIMEOUT_S, so that a silent server is told from a wait."""
FLUSH_TIMEOUT_MS = 10_000
"""How long `flush_to_disk` waits; a server with appendfsync everysec needs a second."""

_SCRIPTS = Path(__file__).parent / "scripts"
_REFUSALS = {
    "OOM": ("is out of memory", "raise maxmemory, or dismiss concluded jobs"),
    "MISCONF": ("cannot write its files", "free space on the disk that holds its append-only file"),
    "READONLY": ("is a read-only replica", "give the URL of the primary"),
    "MASTERDOWN": ("is a replica without its primary", "give the URL of the primary"),
    "BUSY": ("is busy with a script", "try again in some seconds"),
    "UNBLOCKED": ("has become a replica", "wait for the failover, or give the URL of the primary"),
    "NOREPLICAS": ("lacks the replicas it wants", "start them, or lower min-replicas-to-write"),
    "CLUSTERDOWN": ("belongs to a cluster that is down", "repair the cluster"),
    "LOADING": ("is still loading its data", "try again in some seconds"),
}
"""First word of an error reply that says the server takes no writes now: what it means, what to do."""


def _names() -> list[str]:
    """Of all scripts: their paths below `scripts`, without the suffix."""
    paths = sorted(_SCRIPTS.rglob("*.lua"))
    return [path.relative_to(_SCRIPTS).with_suffix("").as_posix() for path in paths if path.stem != "prelude"]


@cache
def _source(name: str) -> str:
    """The script, behind the preludes of its directory and of those above."""
    path = _SCRIPTS / f"{name}.lua"
    above = [where / "prelude.lua" for where in reversed(path.parents) if where.is_relative_to(_SCRIPTS)]
    return "".join(part.read_text() for part in (*above, path))


class _Client:
    """What both connections know of their server: its name for messages, and what its errors mean."""

    def __init__(self, url: str, keys: Keys) -> None:
        self.keys = keys
        self._name = _shown(url)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what redis-py raises into errors of ours."""
        try:
            yield
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise self._unavailable("does not answer", str(error), "start it, or correct its URL") from error
        except ResponseError as error:
            word = _first_word(str(error))
            if word not in _REFUSALS:
                raise FlushpointError(f"the ledger's server refused a command: {error}") from error
            raise self._unavailable(_REFUSALS[word][0], str(error), _REFUSALS[word][1]) from error
        except RedisError as error:
            raise FlushpointError(f"the ledger's server could not be used: {error}") from error

    def _unavailable(self, what: str, detail: str, remedy: str) -> LedgerUnavailableError:
        return LedgerUnavailableError(f"the ledger's server {self._name} {what} ({detail})", remedy)

    @contextlib.contextmanager
    def _checked_url(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            remedy = "write redis://host:port/0, rediss://… or unix:///path/of/socket?db=0"
            raise UsageError(f"{self._name!r} is no URL of a Redis server", remedy) from error


class Server(_Client):
    """One server and the keys of one deployment on it. Thread-safe; usable after a fork (redis-py's pool
    compares process ids, and connects when first used)."""

    def __init__(self, url: str, keys: Keys) -> None:
        super().__init__(url, keys)
        with self._checked_url():
            # Any: redis-py's stubs give each answer as bytes or str, of every protocol version at once.
            self.redis: Any = Redis.from_url(url, retry=Retry(NoBackoff(), 0), **_options(url))
        self._scripts = {name: self.redis.register_script(_source(name)) for name in _names()}

    def close(self) -> None:
        self.redis.close()

    def run(self, script: str, *args: str | int) -> Any:
        """One atomic step."""
        with self.errors():
            return self._scripts[script](keys=[self.keys.prefix], args=list(args))

    def ask(self, script: str, *args: str | int) -> Any:
        """A step that changes nothing when it is done twice: sent again once if its connection broke."""
        with self.errors():
            try:
                return self._scripts[script](keys=[self.keys.prefix], args=list(args))
            except (RedisConnectionError, RedisTimeoutError):
                return self._scripts[script](keys=[self.keys.prefix], args=list(args))

    def run_flushed(self, script: str, *args: str | int) -> Any:
        """One atomic step that is in the append-only file on disk when this returns, if the server has one."""
        with self.errors(), self.redis.client() as one:  # WAITAOF counts writes of its own connection
            answer = self._scripts[script](keys=[self.keys.prefix], args=list(args), client=one)
            try:
                flushed = one.waitaof(1, 0, FLUSH_TIMEOUT_MS)
            except NoScriptError:
                raise
            except ResponseError:
                return answer  # no append-only file, or a server before WAITAOF (Redis 7.2)
        if flushed[0] < 1:
            raise self._unavailable("did not flush to disk in time", "WAITAOF", "do the same once more")
        return answer


class AsyncServer(_Client):
    """The same for asyncio. Belongs to the event loop in which it is first used."""

    def __init__(self, url: str, keys: Keys) -> None:
        super().__init__(url, keys)
        # For its own time limit redis-py calls asyncio.wait_for, which before Python 3.12 now and then swallows the
        # cancelling of its caller: who had cancelled a wait for news would wait all the same. `within` has another.
        options = {**_options(url), "socket_timeout": None}
        with self._checked_url():
            self.redis: Any = async_redis.Redis.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **options)
        self._scripts = {name: self.redis.register_script(_source(name)) for name in _names()}

    async def aclose(self) -> None:
        await self.redis.aclose()

    async def within(self, command: Awaitable[Any]) -> Any:
        """The answer of one command, in SOCKET_TIMEOUT_S at most."""
        with self.errors():
            return await _bounded(command)

    async def ask(self, script: str, *args: str | int) -> Any:
        """As Server.ask."""
        with self.errors():
            try:
                return await _bounded(self._scripts[script](keys=[self.keys.prefix], args=list(args)))
            except (RedisConnectionError, RedisTimeoutError):
                return await _bounded(self._scripts[script](keys=[self.keys.prefix], args=list(args)))


async def _bounded(command: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(SOCKET_TIMEOUT_S):
            return await command
    except TimeoutError as error:
        raise RedisTimeoutError(f"nothing for {SOCKET_TIMEOUT_S:g} s") from error


def _options(url: str) -> dict[str, Any]:
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    return {
        "decode_responses": True,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S / 4,
        "health_check_interval": 15,
        **keepalive,
    }


def _first_word(message: str) -> str:
    """The code of an error reply; redis-py cuts some codes off, and a script's error may carry its own."""
    if message.startswith("OOM command") or "command not allowed when used memory" in message:
        return "OOM"
    return message.replace("-", " ").split(" ", 1)[0]


def _shown(url: str) -> str:
    """The URL without its password."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}".partition("?")[0]
