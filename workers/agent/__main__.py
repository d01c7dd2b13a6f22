"""`python -m workers.agent`: a host's agent."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import aclosing, closing, suppress
from pathlib import Path

import structlog

from coordinator.ledger import open_barrier
from coordinator.logs import configure_logs
from coordinator.model.errors import FlushpointError
from coordinator.settings import Settings, load_settings
from workers.access import Access
from workers.agent.guard import GuardLink
from workers.agent.journal import Journal
from workers.agent.readers import Readers
from workers.agent.relay import Relay
from workers.agent.room import Room
from workers.agent.service import Agent
from workers.agent.sockets import Sockets

log = structlog.get_logger()


async def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT."""
    scratch = Path(settings.scratch_dir)
    scratch.mkdir(mode=0o711, parents=True, exist_ok=True)
    barrier = open_barrier(settings.redis_url, settings.redis_prefix)
    async with aclosing(barrier):
        with closing(GuardLink(Path(settings.guard_socket))) as guard:
            journal = Journal(Path(settings.journal_dir))
            host = settings.agent_host or socket.gethostname()
            relay = Relay(scratch, settings.relay_host, settings.relay_port, settings.relay_tls_dir)
            room = Room(scratch, settings.scratch_reserve, settings.view_limit)
            sockets = Sockets(settings.agent_sockets)
            access = Access(settings.allowed_roots, settings.allowed_endpoints)
            readers = Readers(Path(settings.guard_socket), scratch, settings.relay_host, settings.relay_tls_dir)
            offering = relay if settings.relay_host else None
            agent = Agent(host, barrier, guard, journal, room, sockets, access, readers, offering)
            running = asyncio.create_task(agent.run(lambda: log.info("ready", host=host)))
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, running.cancel)
            with suppress(asyncio.CancelledError):
                await running


def main() -> int:
    configure_logs("agent")
    try:
        asyncio.run(serve(load_settings()))
    except FlushpointError as error:
        print(f"flushpoint agent: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
