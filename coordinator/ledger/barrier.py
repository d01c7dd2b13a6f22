"""What a host's agent asks of the ledger at the barrier of an epoch. `RedisBarrier` and `MemoryBarrier` pass the same
contract tests. The coordinator's part (open, give up, retire) is in contract.py.

For asyncio: any number of calls at once, each over a connection of its own. A server that is silent is given up after
20 s, twice: who holds a guest stopped sets a limit of its own. A call that is cancelled may have had its effect. Every
step may be made again, so one whose answer was lost is: it changes nothing the second time, and tells how the epoch
stands now. Errors: LedgerUnavailableError when the server does not answer, NotFoundError for an epoch that was over
long ago or is lost (nobody may cut for it) and for a machine that takes no part, RefusedError for what nobody was told
to do (after a server has lost writes, too): thaw, and abort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from coordinator.model.epoch import CutFacts, Epoch, ReadFacts, Standing


@dataclass(frozen=True, slots=True)
class News:
    """How an epoch stood after a change of its phase. Old news may be read late: the phase only moves on, and the
    go key never goes back."""

    id: str
    group: str
    number: int
    standing: Standing


class Barrier(Protocol):
    async def epoch(self, group: str, number: int) -> Epoch:
        """All of it. It is kept for an hour after it was over."""

    async def epochs_on(self, host: str) -> list[Epoch]:
        """Those that the host takes part in and that are not over, by name: what an agent that was started again, or
        missed a doorbell, has to look after."""

    async def prepared(self, epoch: Epoch, vm: str) -> Standing:
        """`vm` is ready for its freeze, and runs. The last one begins the phase `freezing`."""

    async def frozen(self, epoch: Epoch, *vms: str) -> Standing:
        """All of `vms` stand still. The last one turns the go key to GO, or to ABORT if the time was over.
        RefusedError while the epoch is preparing: nobody may stop a guest yet."""

    async def cut(self, epoch: Epoch, vm: str, facts: CutFacts) -> Standing:
        """`vm` has its views, did not run between FROZEN and the last of them, and is thawed. The last one makes the
        epoch `taken`. RefusedError before GO; ValueError unless `facts` have one view of each of its disks."""

    async def readable(self, epoch: Epoch, vm: str, facts: ReadFacts) -> Standing:
        """All disks of `vm` can be read as they were at its cut, and nothing that happens to it changes that. The last
        one makes the epoch `readable`. RefusedError before all were cut; ValueError unless `facts` have one copy of
        each of its disks."""

    async def fail_cut(self, epoch: Epoch, vm: str, why: str) -> Standing:
        """After GO: the cut of `vm` failed, or it ran before all of it was cut, or a view broke before all could be
        read. The epoch is aborted; the go key stays GO. RefusedError before GO, and once all can be read."""

    async def abort(self, epoch: Epoch, vm: str, why: str) -> Standing:
        """`vm` cannot go on. Changes nothing after GO: look at the answer, cut or `fail_cut`."""

    async def time_out(self, epoch: Epoch) -> Standing:
        """To be called when `left_ms` of the last answer are over and nothing was heard. Aborts if the ledger's clock
        says so, too; else `left_ms` tells how much longer to wait."""

    async def last_news(self, host: str) -> str:
        """The id after which nothing has been told to the host yet. To be asked for before `epochs_on`, so that nothing
        is missed in between."""

    async def news(self, host: str, after: str, wait_s: float) -> list[News]:
        """What has happened to epochs of the host since the news with this id, oldest first; waits up to `wait_s` for
        the first. One waiting call serves a host, whatever it takes part in. Of old news the last 1000 are kept, for an
        hour."""

    async def aclose(self) -> None:
        """Give connections back."""
