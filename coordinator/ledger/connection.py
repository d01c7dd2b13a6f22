"""The connection to the server: scripts by name, errors by what to do about them.

Nothing here retries a step that changes something: whoever lost the answer asks again with the same token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from redis import Redis
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


@cache
def _source(name: str) -> str:
    return (_SCRIPTS / "prelude.lua").read_text() + (_SCRIPTS / f"{name}.lua").read_text()


class Server:
    """One server and the keys of one deployment on it. Thread-safe; usable after a fork (redis-py's pool
    compares process ids, and connects when first used)."""

    def __init__(self, url: str, keys: Keys) -> None:
        self.keys = keys
        try:
            # Any: redis-py's stubs give each answer as bytes or str, of every protocol version at once.
            self.redis: Any = Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=SOCKET_TIMEOUT_S,
                socket_connect_timeout=SOCKET_TIMEOUT_S / 4,
                health_check_interval=15,
                retry=Retry(NoBackoff(), 0),
                **({} if url.startswith("unix:") else {"socket_keepalive": True}),
            )
        except ValueError as error:
            remedy = "write redis://host:port/0, rediss://… or unix:///path/of/socket?db=0"
            raise UsageError(f"{_shown(url)!r} is no URL of a Redis server", remedy) from error
        self._name = _shown(url)
        self._scripts = {
            path.stem: self.redis.register_script(_source(path.stem))
            for path in sorted(_SCRIPTS.glob("*.lua"))
            if path.stem != "prelude"
        }

    def close(self) -> None:
        self.redis.close()

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

    def _unavailable(self, what: str, detail: str, remedy: str) -> LedgerUnavailableError:
        return LedgerUnavailableError(f"the ledger's server {self._name} {what} ({detail})", remedy)


def _first_word(message: str) -> str:
    """The code of an error reply; redis-py cuts some codes off, and a script's error may carry its own."""
    if message.startswith("OOM command") or "command not allowed when used memory" in message:
        return "OOM"
    return message.replace("-", " ").split(" ", 1)[0]


def _shown(url: str) -> str:
    """The URL without its password."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}".partition("?")[0]
