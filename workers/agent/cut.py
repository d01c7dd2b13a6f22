"""A guest's part of a cut: stopped, its bitmaps rotated and its views put in place, running again.

    freeze()    stop; from here on the guest's deadline runs
    take()      rotate bitmaps, insert views
    go_on()     it has not run since; cont
    thaw()      cont, whatever came

A cut counts only if nobody let the guest run in between: the monitor's own stream of events must show that it stood
still from the stop to the cont. A guest that was not running before is cut as it is, and stays as it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from coordinator.model.bitmap import Rotation
from coordinator.model.epoch import ViewKind
from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError
from workers.agent.guard import GuardLink
from workers.agent.guest import OURS, GuestDisk
from workers.agent.journal import Journal
from workers.agent.monitor import ANSWER_S, Command, GuestRefusedError, GuestSilentError, Monitor
from workers.agent.views import View, inserting

MIRROR = f"{OURS}pivot-"
"""How ids of jobs begin for which a running guest's writes may have to wait."""
_guards = ThreadPoolExecutor(64, thread_name_prefix="guard")
"""Threads that wait for a guard: others may wait for disks, and guests stand still meanwhile."""
_RAN = frozenset({"RESUME", "WAKEUP"})


async def _at_once() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Part:
    """What a cut does to one disk."""

    view: View
    rotation: Rotation
    held: int
    """How many bytes of the disk, from its beginning, the point has that it builds on."""
    kind: ViewKind = ViewKind.STAGE
    """How it will be read ..."""
    why: str = ""
    """... and why not as was asked for."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """Since when a guest stands still; `ends_at` is when it has to run again, both monotonic seconds."""

    heard: int
    """The last event before it was stopped."""
    was_running: bool
    stopped_at: float
    ends_at: float
    blocks: Sequence[Mapping[str, Any]] = ()
    """What query-block told when it stood still."""


class Vm:
    """A guest under its monitor. `order` is held by whoever stops, continues or finalizes a job: with an IOThread, QEMU
    aborts if a job ends just when it is stopped or continued. `turn` is an epoch's from its look at the bitmaps until
    it has cut or given up: were another to cut in between, what is written then would go to a bitmap of that one's."""

    is_off = False
    """Whether nobody runs it, and a QEMU of the agent's own has its disks (standin.py)."""

    def __init__(self, monitor: Monitor, guard: GuardLink, journal: Journal) -> None:
        self.monitor = monitor
        self.order = asyncio.Lock()
        self.turn = asyncio.Lock()
        self.guard = guard
        self.journal = journal
        self._is_held = False
        """The guard was told of a stop, and nobody has heard the guest say that it runs since."""
        self._armed: bool | None = None
        """Whether the guest ran when the journal was written for its next stop; None: it was not."""

    async def freeze(
        self,
        deadline_s: float,
        together: Callable[[], Awaitable[object]] = _at_once,
        cancel: Sequence[str] = (),
    ) -> Frozen:
        """Stop the guest, for at most `deadline_s`, whatever comes: `thaw` is to follow. RefusedError while it is
        migrated; UnavailableError if the guard or the journal fails: then it is not stopped. `together` is waited for
        when all is ready for the stop. A guard that lets it run cancels the jobs `cancel` before."""
        ends_at = time.monotonic() + deadline_s
        while True:
            was_running = await self.arm()
            frozen = await self._stopped(was_running, ends_at, together, cancel)
            if frozen.was_running is was_running:
                return frozen
            if was_running:  # its user has stopped it just now, so it stays as it is
                await self._forget()
                return replace(frozen, heard=self.monitor.heard)

    async def _stopped(
        self, running: bool, ends_at: float, together: Callable[[], Awaitable[object]], cancel: Sequence[str]
    ) -> Frozen:
        """As it is then: what did not run when it was armed is not stopped, though its user may have continued it."""
        if running:
            self._is_held = True
            told = partial(self.guard.freeze, self._name, self.monitor.fileno(), ends_at - time.monotonic(), cancel)
            try:
                await asyncio.get_running_loop().run_in_executor(_guards, told)
            except BaseException:  # cancelled: the guard hears of it all the same
                self._armed = None
                await self._forget()
                raise
        self._armed = None
        frozen = Frozen(self.monitor.heard, running, time.monotonic(), ends_at)
        stop: list[Command] = [("stop", {})] if running else []
        try:
            await together()
            frozen = replace(frozen, heard=self.monitor.heard, stopped_at=time.monotonic())
            asked: list[Command] = [("query-status", {}), *stop, ("query-block", {})]
            status, *_, blocks = await self.monitor.execute_all(asked, max(0.01, ends_at - time.monotonic()))
        except BaseException:
            await self.thaw(frozen)
            raise
        return replace(frozen, blocks=blocks, was_running=bool(status["running"]))

    async def arm(self) -> bool:
        """What takes time and can be done before a stop: the guest is asked whether it runs, and the journal written.
        `freeze` or `disarm` is to follow. RefusedError while it is migrated; UnavailableError if one of those fails."""
        if self._armed is None:
            status = await self.monitor.execute("query-status")
            if status["status"] in ("inmigrate", "finish-migrate"):
                raise RefusedError("the guest is being migrated", "try again when that is done")
            if status["running"]:
                await asyncio.to_thread(self.guard.check)
                await asyncio.to_thread(self.journal.write, self.monitor.path, self.monitor.process())
            self._armed = bool(status["running"])
        return self._armed

    async def disarm(self) -> None:
        """It is not stopped. Any number of times."""
        armed, self._armed = self._armed, None
        if armed:
            await asyncio.to_thread(self.journal.erase, self.monitor.path)

    async def take(self, frozen: Frozen, parts: Sequence[Part]) -> None:
        """Rotate and insert, all within the deadline; whether the guest ran meanwhile is for `go_on` or `confirm` to
        say. After any error views are to be removed. RefusedError."""
        _refuse_changed(frozen.blocks, parts)
        commands: list[Command] = [("transaction", {"actions": _actions(parts)})] if parts else []
        for part in parts:
            commands += inserting(part.view)
        await self.monitor.execute_all(commands, _left(frozen))

    async def confirm(self, frozen: Frozen) -> None:
        """RefusedError if the guest has run since it was stopped."""
        if await self.has_run(frozen, _left(frozen)):
            raise _has_run()

    async def go_on(
        self, frozen: Frozen, together: Callable[[], Awaitable[object]] = _at_once
    ) -> tuple[float, RefusedError | None]:
        """`thaw`, and what is to be raised if it had run before that. It is asked and told at once: what stopped it
        first was ours, so it has run if it was stopped again, or runs when it is asked. Before anything else is done
        `together` is waited for. GuestSilentError."""
        cont: list[Command] = [("cont", {})] if frozen.was_running else []
        status, *_ = await self.monitor.execute_all([("query-status", {}), *cont], ANSWER_S)
        stood_s = time.monotonic() - frozen.stopped_at if frozen.was_running else 0.0
        names = [event.name for event in self.monitor.events_since(frozen.heard)]
        stopped_again = names.count("STOP") > (1 if frozen.was_running else 0)
        ran = status["running"] or stopped_again or "WAKEUP" in names
        await together()
        if frozen.was_running:
            await self._forget()
        return stood_s, _has_run() if ran else None

    async def has_run(self, frozen: Frozen, timeout_s: float) -> bool:
        """Since it was stopped."""
        status = await self.monitor.execute("query-status", timeout_s=timeout_s)
        return bool(status["running"]) or any(e.name in _RAN for e in self.monitor.events_since(frozen.heard))

    async def thaw(self, frozen: Frozen) -> float:
        """Let the guest run again if it did before; how long it stood still, in seconds. GuestSilentError: then the
        guard goes on with it."""
        if not frozen.was_running:
            return 0.0
        await self.monitor.execute("cont")
        stood_s = time.monotonic() - frozen.stopped_at
        await self._forget()
        return stood_s

    async def _forget(self) -> None:
        """It runs: neither guard nor journal has to do with it any more."""
        self._is_held = False
        with suppress(UnavailableError):  # a guard that is gone or hangs lets the guest run, too
            await asyncio.to_thread(self.guard.thawed, self._name)
        await asyncio.to_thread(self.journal.erase, self.monitor.path)

    def forgets(self, disk: GuestDisk) -> bool:
        """Whether a bitmap that is added now ends with the epoch, so that it tells the next one nothing."""
        return self.is_off and not disk.keeps_bitmaps

    async def close(self) -> None:
        """Give monitor and guard back. A guest that has not said that it runs is the guard's from now on: QEMU would
        drop what it has not read of a connection that has ended."""
        with suppress(UnavailableError):  # the journal remembers it
            if self._is_held:
                await asyncio.to_thread(self.guard.leave, self._name, self.monitor.fileno())
            else:
                await self.disarm()
        await self.monitor.close()
        self.guard.close()

    @property
    def _name(self) -> str:
        return str(self.monitor.path)


def _has_run() -> RefusedError:
    return RefusedError(
        "somebody let the guest run while it was cut", "keep others from continuing it, or give it a longer deadline"
    )


async def let_run(journal: Journal) -> list[str]:
    """Let guests run that an agent and a guard, both killed, have left stopped; what was done, a sentence each."""
    done = []
    for path in journal.frozen():
        try:
            monitor = await Monitor.connect(path)
        except NotFoundError:
            done.append(f"{path} has ended since it was stopped")
        except FlushpointError as error:  # it stays in the journal, and others are not to wait for it
            done.append(f"cannot let {path} run: {error}")
            continue
        else:
            try:
                if journal.is_of(path, monitor.process()):
                    await resume(monitor)
                    done.append(f"let {path} run, which stood still since its agent was killed")
                else:
                    done.append(f"{path} was started again since it was stopped")
            except FlushpointError as error:
                done.append(f"cannot let {path} run: {error}")
                continue
            finally:
                await monitor.close()
        journal.erase(path)
    return done


async def resume(monitor: Monitor) -> None:
    """Of a guest that may stand still: it runs where it is, and no write of it waits for a job. GuestSilentError."""
    await _cancel_mirrors(monitor)
    await monitor.execute("cont")


def _refuse_changed(blocks: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> None:
    """RefusedError if bitmaps were not what they had been when the rotation was decided: who has disabled one since has
    hidden writes from it. `blocks` as query-block told before the rotation."""
    attached = {(block.get("inserted") or {}).get("node-name") for block in blocks}
    for part in parts:
        if part.view.disk.node not in attached:
            raise RefusedError(
                f"somebody has attached {part.view.disk.device} to another image just now", "the next epoch takes it so"
            )
    for block in blocks:
        inserted = block.get("inserted") or {}
        now = {bitmap.get("name"): bool(bitmap["recording"]) for bitmap in inserted.get("dirty-bitmaps", ())}
        for part in parts:
            if part.view.disk.node != inserted.get("node-name") or not part.rotation.since:
                continue
            if any(now.get(name) is not (name in part.rotation.disable) for name in part.rotation.changed):
                raise RefusedError(
                    f"somebody has changed the bitmaps of {part.view.disk.device} just now",
                    "keep others from them; the next epoch compares contents",
                )


async def _cancel_mirrors(monitor: Monitor) -> None:
    for job in await monitor.execute("query-jobs"):
        if str(job["id"]).startswith(MIRROR) and job["status"] != "concluded":
            with suppress(GuestRefusedError):  # it may just be ending by itself
                await monitor.execute("job-cancel", {"id": job["id"]})


def _left(frozen: Frozen) -> float:
    left = frozen.ends_at - time.monotonic()
    if left <= 0:
        raise GuestSilentError("the guest was not cut within its deadline", "give it a longer one")
    return left


def _actions(parts: Sequence[Part]) -> list[dict[str, object]]:
    actions: list[dict[str, object]] = []
    for part in parts:
        disk, rotation = part.view.disk, part.rotation
        new = {"node": disk.node, "name": rotation.add, "persistent": disk.keeps_bitmaps}
        actions.append({"type": "block-dirty-bitmap-add", "data": new})
        olds = [{"node": disk.node, "name": name} for name in rotation.disable]
        actions += [{"type": "block-dirty-bitmap-disable", "data": old} for old in olds]
        broken = [{"node": disk.node, "name": name} for name in rotation.remove]
        actions += [{"type": "block-dirty-bitmap-remove", "data": old} for old in broken]
    return actions
