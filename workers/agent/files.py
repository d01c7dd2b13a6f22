"""The file systems of a guest around its cut: frozen through its agent, if it lets us, and thawed whatever comes.

::

    open()      somebody answers, and nothing is frozen yet          (while the epoch prepares)
    freeze()    guard and journal told, then frozen, within a share of the guest's deadline
                … stop, cut, cont …
    thaw()      thawed, and as many as were frozen

Nothing that fails here fails the cut: disks are then crash-consistent, as they would have been otherwise, and
`fallback` says why. But a frozen file system holds up whoever writes it as a stopped guest does, so it has the same
deadline, and the same guard.

A freeze that takes too long is followed by a thaw at once, on the same connection: the guest's agent does one thing
after another, so file systems are frozen for no longer than it goes on freezing. Only an answer proves that they are
thawed, and QEMU drops what a connection holds that is ended: without one the connection is left to the guard.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from coordinator.model.errors import FlushpointError, NotFoundError, UnavailableError
from workers.agent.guard import GuardLink
from workers.agent.guest_agent import GuestAgent, GuestAgentError
from workers.agent.journal import Journal
from workers.agent.monitor import Monitor
from workers.agent.sockets import Sockets

SHARE = 0.5
"""Of the guest's deadline, for freezing; the rest is for the stop, for the wait for other guests, and for the cut."""
_FREEZE = "guest-fsfreeze-freeze"
_STATUS = "guest-fsfreeze-status"
_THAW = "guest-fsfreeze-thaw"


class FileSystems:
    """Those of one guest, for one cut."""

    def __init__(self, agent: GuestAgent | None, guard: GuardLink, journal: Journal, fallback: str = "") -> None:
        """Without an agent they are let alone, because of `fallback`."""
        self._agent = agent
        self._guard = guard
        self._journal = journal.files
        self._was_told = False
        self._thawing = ""
        """The thaw that was sent and not answered yet."""
        self._frozen = 0
        self.fallback = fallback
        """Why they are not consistent, where that was asked for."""
        self.consistent = False
        """They were frozen from before the guest was stopped until it ran again: known once they are thawed."""

    @classmethod
    async def open(
        cls, path: str, sockets: Sockets, guard: GuardLink, journal: Journal, timeout_s: float
    ) -> FileSystems:
        """For a cut that is to be consistent; `path` is of the guest agent's socket, "" where none is named."""
        if not path:
            return cls(None, guard, journal, "no guest agent is named")
        agent: GuestAgent | None = None
        try:
            async with asyncio.timeout(timeout_s):
                agent = await GuestAgent.connect(sockets.checked(path))
                await agent.greet()
                if await agent.execute(_STATUS) != "thawed":
                    raise GuestAgentError("somebody else has frozen file systems through the guest agent")
        except (FlushpointError, TimeoutError) as error:
            if agent is not None:
                agent.close()
            silent = f"the guest agent did not answer for {timeout_s:.2g} s"
            return cls(None, guard, journal, error.message if isinstance(error, FlushpointError) else silent)
        return cls(agent, guard, journal)

    async def freeze(self, monitor: Monitor, deadline_s: float) -> None:
        """For at most `deadline_s`: `thaw` is to follow, whatever comes. GuestSilentError of the monitor."""
        if self._agent is None:
            return
        ends_at = time.monotonic() + deadline_s * SHARE
        status = await monitor.execute("query-status", timeout_s=deadline_s)
        if not status["running"]:
            self._fall_back("the guest was not running")  # and nobody in there would hear us
            return
        try:
            await self._tell_guard(self._agent, deadline_s)
        except UnavailableError as error:
            self._fall_back(error.message)
            with suppress(UnavailableError):
                await asyncio.to_thread(self._journal.erase, self._agent.path)
            return
        self._was_told = True
        try:
            frozen = await self._agent.execute(_FREEZE, ends_at - time.monotonic())
            if not isinstance(frozen, int) or frozen < 1:
                raise GuestAgentError("the guest agent found no file system to freeze")
            self._frozen = frozen
        except GuestAgentError as error:
            self._fall_back(f"not frozen: {error.message}")
            with suppress(GuestAgentError):
                self._thawing = await self._agent.send(_THAW)

    async def thaw(self) -> None:
        """Once the guest runs. Whoever is not heard to thaw is left to the guard."""
        if self._agent is None or not self._was_told:
            return
        try:
            thawed = await self._agent.answer(self._thawing or await self._agent.send(_THAW))
        except GuestAgentError as error:
            self._fall_back(f"not known to have stayed frozen: {error.message}")
            await leave(self._guard, self._agent)
        else:
            if thawed == self._frozen:
                self.consistent = not self.fallback
            else:
                self._fall_back("somebody else thawed file systems before the guest was cut")
            with suppress(UnavailableError):  # a guard that is gone or hangs has them thawed, too
                await asyncio.to_thread(self._guard.thawed, str(self._agent.path))
            await asyncio.to_thread(self._journal.erase, self._agent.path)
        self._was_told = False

    @property
    def are_held(self) -> bool:
        """Whoever writes them waits for `thaw`."""
        return self._was_told

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()

    async def _tell_guard(self, agent: GuestAgent, deadline_s: float) -> None:
        await asyncio.to_thread(self._journal.write, agent.path)
        await asyncio.to_thread(self._guard.freeze_files, str(agent.path), agent.fileno(), deadline_s)

    def _fall_back(self, why: str) -> None:
        """The first reason is the one."""
        self.fallback = self.fallback or why


async def leave(guard: GuardLink, agent: GuestAgent) -> None:
    """To the guard, which goes on until it is heard to have thawed. Nobody else may use the connection any more."""
    with suppress(UnavailableError):  # the journal remembers it for the next agent
        await asyncio.to_thread(guard.leave_files, str(agent.path), agent.fileno())


async def thaw_left(journal: Journal, guard: GuardLink) -> list[str]:
    """Thaw what an agent and a guard, both killed, have left frozen; what was done, a sentence each."""
    done = []
    for path in list(journal.files.frozen()):
        agent: GuestAgent | None = None
        try:
            agent = await GuestAgent.connect(path)
            await agent.greet()
            await agent.execute(_THAW)
            done.append(f"thawed file systems through {path}, which were frozen since their agent was killed")
        except NotFoundError:
            done.append(f"{path} has ended since its file systems were frozen")
        except FlushpointError as error:
            done.append(f"cannot thaw file systems through {path} yet: {error.message}")
            if agent is not None:
                await leave(guard, agent)
            continue  # remembered until somebody has heard of it
        finally:
            if agent is not None:
                agent.close()
        journal.files.erase(path)
    return done
