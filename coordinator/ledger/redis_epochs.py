"""Epochs and their barrier, in Redis: the coordinator's part, and the agents'."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from coordinator.ledger.barrier import News
from coordinator.ledger.connection import BLOCK_S, AsyncServer, Server
from coordinator.ledger.contract import Term
from coordinator.ledger.keys import DEFAULT_PREFIX, Keys
from coordinator.ledger.records import pairs
from coordinator.ledger.redis_fleet import FIRST_EVENT_ID, checked_event_id
from coordinator.ledger.redis_jobs import deposed
from coordinator.model.epoch import (
    Arrival,
    CutFacts,
    Epoch,
    EpochSpec,
    Phase,
    ReadFacts,
    Standing,
    checked_facts,
    checked_group,
    checked_reads,
    not_over,
    not_readable,
    too_early,
    too_late_to_fail,
    unknown_epoch,
)
from coordinator.model.errors import RefusedError

EPOCH_KEPT_MS = 3_600_000
"""Of one that is over, for participants that come late; and of news. Also in scripts/epochs/prelude.lua."""
NEWS = 1000
"""Pieces of news that are kept for a host; there, too."""


def restarted() -> RefusedError:
    return RefusedError("the ledger's server was restarted and may have lost writes", "recover, and adopt its run")


def epoch_of(answer: Any) -> Epoch:
    fields, prepared, frozen, cuts, reads = answer
    known = pairs(fields)
    return Epoch.model_validate(
        {
            **known,
            "spec": EpochSpec.model_validate_json(known["spec"]),
            "prepared": prepared,
            "frozen": frozen,
            "cuts": {vm: CutFacts.model_validate_json(facts) for vm, facts in pairs(cuts).items()},
            "reads": {vm: ReadFacts.model_validate_json(facts) for vm, facts in pairs(reads).items()},
        }
    )


class RedisEpochs:
    _server: Server

    def open_epoch(self, term: Term, group: str, spec: EpochSpec, after: int = 0) -> Epoch:
        answer = self._server.run(
            "epochs/open",
            term.generation,
            term.nonce,
            checked_group(group),
            after,
            spec.prepare_ms,
            spec.model_dump_json(),
            "\n".join(spec.hosts),
            *spec.vms,
        )
        if answer[0] == "deposed":
            raise deposed(term)
        if answer[0] == "restarted":
            raise restarted()
        if answer[0] == "open":
            raise not_over(f"{group}@{answer[1]}", Phase(answer[2]))
        return epoch_of(answer[1])

    def newest_epoch(self, group: str) -> Epoch | None:
        answer = self._server.ask("epochs/newest", group)
        return epoch_of(answer) if answer else None

    def expire_epochs(self, term: Term) -> list[tuple[str, str]]:
        answer = self._server.run("epochs/expire", *_fence(term))
        if answer[0] == "deposed":
            raise deposed(term)
        return sorted(zip(answer[1::2], answer[2::2], strict=True))

    def give_up_epoch(self, term: Term, group: str, number: int, why: str) -> Epoch:
        return self._end(term, group, number, self._server.ask("epochs/give_up", *_fence(term), group, number, why))

    def retire_epoch(self, term: Term, group: str, number: int) -> Epoch:
        return self._end(term, group, number, self._server.ask("epochs/retire", *_fence(term), group, number))

    def _end(self, term: Term, group: str, number: int, answer: Any) -> Epoch:
        if answer[0] == "deposed":
            raise deposed(term)
        if answer[0] == "missing":
            raise unknown_epoch(f"{group}@{number}")
        if answer[0] == "refused":
            raise not_readable(f"{group}@{number}", Phase(answer[1]))
        return epoch_of(answer[1])


class RedisBarrier:
    """`url` as of RedisLedger. Belongs to the event loop in which it is first used."""

    def __init__(self, url: str, *, prefix: str = DEFAULT_PREFIX) -> None:
        self._server = AsyncServer(url, Keys(prefix))

    async def epoch(self, group: str, number: int) -> Epoch:
        answer = await self._server.ask("epochs/read", group, number)
        if not answer:
            raise unknown_epoch(f"{group}@{number}")
        return epoch_of(answer)

    async def epochs_on(self, host: str) -> list[Epoch]:
        found = [epoch_of(answer) for answer in await self._server.ask("epochs/on_host", host)]
        return sorted(found, key=lambda epoch: (epoch.group, epoch.number))

    async def prepared(self, epoch: Epoch, vm: str) -> Standing:
        return await self._arrive(epoch, [vm], Arrival.PREPARED)

    async def frozen(self, epoch: Epoch, *vms: str) -> Standing:
        return await self._arrive(epoch, vms, Arrival.FROZEN)

    async def cut(self, epoch: Epoch, vm: str, facts: CutFacts) -> Standing:
        return await self._arrive(epoch, [vm], Arrival.CUT, checked_facts(epoch, vm, facts).model_dump_json())

    async def readable(self, epoch: Epoch, vm: str, facts: ReadFacts) -> Standing:
        return await self._arrive(epoch, [vm], Arrival.READABLE, checked_reads(epoch, vm, facts).model_dump_json())

    async def fail_cut(self, epoch: Epoch, vm: str, why: str) -> Standing:
        answer = await self._ask("fail_cut", epoch, f"{epoch.participant(vm).vm}: {why}")
        if answer[0] == "early":
            raise too_early(epoch.name, vm, Arrival.CUT, Phase(answer[1]))
        if answer[0] == "late":
            raise too_late_to_fail(epoch.name, Phase(answer[1]))
        return _standing(answer)

    async def abort(self, epoch: Epoch, vm: str, why: str) -> Standing:
        return _standing(await self._ask("abort", epoch, f"{epoch.participant(vm).vm}: {why}"))

    async def time_out(self, epoch: Epoch) -> Standing:
        return _standing(await self._ask("arrive", epoch))

    async def last_news(self, host: str) -> str:
        newest = await self._server.within(self._server.redis.xrevrange(self._server.keys.epoch_news(host), count=1))
        return str(newest[0][0]) if newest else FIRST_EVENT_ID

    async def news(self, host: str, after: str, wait_s: float) -> list[News]:
        key, position = self._server.keys.epoch_news(host), checked_event_id(after)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            left = deadline - loop.time()
            block = max(1, int(min(left, BLOCK_S) * 1000)) if left > 0 else None  # 0 would be for ever
            answer = await self._server.within(self._server.redis.xread({key: position}, NEWS, block))
            if answer:
                return [_news(news_id, fields) for news_id, fields in answer[0][1]]
            if block is None:
                return []

    async def aclose(self) -> None:
        await self._server.aclose()

    async def _arrive(self, epoch: Epoch, vms: Sequence[str], arrival: Arrival, facts: str = "") -> Standing:
        answer = await self._ask("arrive", epoch, arrival, facts, *(epoch.participant(vm).vm for vm in vms))
        if answer[0] == "early":
            raise too_early(epoch.name, ", ".join(vms), arrival, Phase(answer[1]))
        return _standing(answer)

    async def _ask(self, step: str, epoch: Epoch, *args: str) -> Any:
        answer = await self._server.ask(f"epochs/{step}", epoch.group, epoch.number, *args)
        if answer[0] == "missing":
            raise unknown_epoch(epoch.name)
        return answer


def _fence(term: Term) -> tuple[int, str]:
    return term.generation, term.nonce


def _standing(answer: Any) -> Standing:
    phase, key, why, left_ms = answer
    return Standing(phase=phase, key=key, why=why, left_ms=left_ms)


def _news(news_id: str, fields: dict[str, str]) -> News:
    standing = Standing.model_validate({name: fields[name] for name in Standing.model_fields})
    return News(news_id, fields["group"], int(fields["number"]), standing)
