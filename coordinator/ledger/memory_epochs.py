"""Epochs and their barrier in memory, by coordinator.model.epoch itself: the twin of redis_epochs.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from coordinator.ledger.barrier import News
from coordinator.ledger.contract import GROUP_WAKE, Term
from coordinator.ledger.redis_epochs import EPOCH_KEPT_MS, NEWS, restarted
from coordinator.ledger.redis_fleet import FIRST_EVENT_ID, checked_event_id
from coordinator.model import epoch as model
from coordinator.model.epoch import (
    Arrival,
    CutFacts,
    Epoch,
    EpochSpec,
    Phase,
    ReadFacts,
    Standing,
    checked_facts,
    checked_reads,
    unknown_epoch,
)


class MemoryEpochs:
    def __init__(
        self,
        lock: threading.Condition,
        clock: Callable[[], float],
        fence: Callable[[Term], None],
        run_is_known: Callable[[], bool],
        run: Callable[[], int],
        wake: Callable[[str], None],
    ) -> None:
        self._guarded = lock
        self._ticks = clock
        self._check_term = fence
        self._adopted = run_is_known
        self._run_now = run
        self._opened_by: dict[tuple[str, int], int] = {}
        self._wake_leader = wake
        self._epochs: dict[tuple[str, int], Epoch] = {}
        self._numbers: dict[str, int] = {}
        self._news: defaultdict[str, deque[tuple[int, News]]] = defaultdict(lambda: deque(maxlen=NEWS))
        self._news_numbers = itertools.count(1)
        self._listeners: set[Callable[[], object]] = set()

    def open_epoch(self, term: Term, group: str, spec: EpochSpec, after: int = 0) -> Epoch:
        with self._guarded:
            now_ms = self._ticks_ms()
            opened = model.open_epoch(group, max(self._numbers.get(group, 0), after) + 1, spec, now_ms)
            self._check_term(term)
            if not self._adopted():
                raise restarted()
            last = self.newest_epoch(group)
            if last is not None and not last.is_over:
                raise model.not_over(last.name, last.phase)
            self._numbers[group] = opened.number
            self._opened_by[group, opened.number] = self._run_now()
            self._keep(opened, now_ms)
            return opened

    def newest_epoch(self, group: str) -> Epoch | None:
        with self._guarded:
            self._expire()
            return self._epochs.get((group, self._numbers.get(group, 0)))

    def expire_epochs(self, term: Term) -> list[tuple[str, str]]:
        with self._guarded:
            self._check_term(term)
            open_ones = [(known.group, known.number) for known in self._epochs.values() if not known.is_over]
            after = [self.step_epoch(group, number, model.time_out)[0] for group, number in open_ones]
            return sorted((epoch.name, epoch.why) for epoch in after if epoch.is_over)

    def give_up_epoch(self, term: Term, group: str, number: int, why: str) -> Epoch:
        with self._guarded:
            self._check_term(term)
            return self.step_epoch(group, number, lambda epoch, now_ms: model.give_up(epoch, why, now_ms))[0]

    def retire_epoch(self, term: Term, group: str, number: int) -> Epoch:
        with self._guarded:
            self._check_term(term)
            return self.step_epoch(group, number, model.retire)[0]

    # -- for MemoryBarrier --------------------------------------------------------------------------------------
    def step_epoch(self, group: str, number: int, step: Callable[[Epoch, int], Epoch]) -> tuple[Epoch, Standing]:
        with self._guarded:
            now_ms, before = self._ticks_ms(), self.epoch_of(group, number)
            after = step(before, now_ms)
            if after.phase is Phase.ABORTED and not before.is_over:
                doubtful = self._opened_by[group, number] != self._run_now()
                after = after.model_copy(update={"doubtful": doubtful})
            self._epochs[group, number] = after
            if after.phase is not before.phase:
                self._keep(after, now_ms)
            return after, after.standing(now_ms)

    def epoch_of(self, group: str, number: int) -> Epoch:
        with self._guarded:
            self._expire()
            if (group, number) not in self._epochs:
                raise unknown_epoch(f"{group}@{number}")
            return self._epochs[group, number]

    def open_epochs(self, host: str) -> list[Epoch]:
        with self._guarded:
            return [known for _, known in sorted(self._epochs.items()) if known.on(host) and not known.is_over]

    def news_after(self, host: str, position: tuple[int, int]) -> list[News]:
        with self._guarded:
            self._expire()
            return [news for _, news in self._news[host] if (int(news.id.partition("-")[0]), 0) > position]

    @contextlib.contextmanager
    def listening(self, listener: Callable[[], object]) -> Iterator[None]:
        """Call it after every piece of news, in the thread that made it."""
        with self._guarded:
            self._listeners.add(listener)
        try:
            yield
        finally:
            with self._guarded:
                self._listeners.discard(listener)

    def _ticks_ms(self) -> int:
        return int(self._ticks() * 1000)

    def _keep(self, epoch: Epoch, now_ms: int) -> None:
        """It is in a new phase: tell its hosts, and the leader where it has to act."""
        self._epochs[epoch.group, epoch.number] = epoch
        standing = epoch.standing(now_ms)
        for host in epoch.spec.hosts:
            news = News(f"{next(self._news_numbers)}-0", epoch.group, epoch.number, standing)
            self._news[host].append((now_ms, news))
        for listener in self._listeners:
            listener()
        if epoch.phase in (Phase.TAKEN, Phase.READABLE, Phase.ABORTED):
            self._wake_leader(GROUP_WAKE + epoch.group)

    def _expire(self) -> None:
        since = self._ticks_ms() - EPOCH_KEPT_MS
        for name in [name for name, epoch in self._epochs.items() if epoch.is_over and epoch.over_ms <= since]:
            del self._epochs[name], self._opened_by[name]
        for host in [host for host, news in self._news.items() if news and news[-1][0] <= since]:
            del self._news[host]


class MemoryBarrier:
    """Of a ledger in this process."""

    def __init__(self, ledger: MemoryEpochs) -> None:
        self._ledger = ledger

    async def epoch(self, group: str, number: int) -> Epoch:
        return self._ledger.epoch_of(group, number)

    async def epochs_on(self, host: str) -> list[Epoch]:
        return self._ledger.open_epochs(host)

    async def prepared(self, epoch: Epoch, vm: str) -> Standing:
        return self._step(epoch, lambda known, now_ms: model.arrive(known, vm, Arrival.PREPARED, now_ms))

    async def frozen(self, epoch: Epoch, *vms: str) -> Standing:
        def step(known: Epoch, now_ms: int) -> Epoch:
            for vm in vms:
                known = model.arrive(known, vm, Arrival.FROZEN, now_ms)
            return known

        return self._step(epoch, step)

    async def cut(self, epoch: Epoch, vm: str, facts: CutFacts) -> Standing:
        checked_facts(epoch, vm, facts)
        return self._step(epoch, lambda known, now_ms: model.arrive(known, vm, Arrival.CUT, now_ms, facts))

    async def readable(self, epoch: Epoch, vm: str, facts: ReadFacts) -> Standing:
        checked_reads(epoch, vm, facts)
        return self._step(epoch, lambda known, now_ms: model.arrive(known, vm, Arrival.READABLE, now_ms, facts))

    async def fail_cut(self, epoch: Epoch, vm: str, why: str) -> Standing:
        return self._step(epoch, lambda known, now_ms: model.fail_cut(known, vm, why, now_ms))

    async def abort(self, epoch: Epoch, vm: str, why: str) -> Standing:
        return self._step(epoch, lambda known, now_ms: model.abort(known, vm, why, now_ms))

    async def time_out(self, epoch: Epoch) -> Standing:
        return self._step(epoch, model.time_out)

    async def last_news(self, host: str) -> str:
        found = self._ledger.news_after(host, (0, 0))
        return found[-1].id if found else FIRST_EVENT_ID

    async def news(self, host: str, after: str, wait_s: float) -> list[News]:
        first, _, second = checked_event_id(after).partition("-")
        position = (int(first), int(second or 0))
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        deadline = loop.time() + wait_s
        with self._ledger.listening(lambda: loop.call_soon_threadsafe(woken.set)):
            while True:
                woken.clear()
                found = self._ledger.news_after(host, position)
                left = deadline - loop.time()
                if found or left <= 0:
                    return found
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await woken.wait()

    async def aclose(self) -> None:
        """Nothing to close; there so that both can be closed."""

    def _step(self, epoch: Epoch, step: Callable[[Epoch, int], Epoch]) -> Standing:
        return self._ledger.step_epoch(epoch.group, epoch.number, step)[1]
