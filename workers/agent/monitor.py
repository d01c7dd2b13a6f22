"""A guest's QMP monitor (docs/interop/qmp-spec.rst of QEMU).

A monitor has one client at a time: a second one connects and waits for a greeting that does not come. So one process a
host, the agent, has them all, and whoever else has to speak on one is given a duplicate of its descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
)

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError

CONNECT_S = 2.0
ANSWER_S = 10.0
"""For what a guest does not wait for. A monitor that is silent for longer belongs to a QEMU that hangs."""
EVENTS = 1000
"""How many of the latest events are remembered; a cut needs those of its own second."""

ALLOWED = frozenset(
    {
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-merge",
        "block-dirty-bitmap-remove",
        "block-export-add",
        "block-export-del",
        "blockdev-add",
        "blockdev-backup",
        "blockdev-del",
        "blockdev-mirror",
        "cont",
        "job-cancel",
        "job-complete",
        "job-dismiss",
        "job-finalize",
        "nbd-server-start",
        "nbd-server-stop",
        "qom-get",
        "qom-set",
        "query-block",
        "query-block-exports",
        "query-jobs",
        "query-named-block-nodes",
        "query-status",
        "query-version",
        "stop",
        "transaction",
        "x-debug-query-block-graph",
        "yank",
    }
)
"""All that is ever said to a guest's QEMU."""

Command = tuple[str, Mapping[str, object]]
"""Its name and its arguments."""
_ASKED = "flushpoint-asked-"
"""How the ids of commands begin whose answers are waited for."""
_SAID = "flushpoint-said"
"""The id of commands whose answers nobody waits for."""
_PEER = struct.Struct("iII")


class GuestRefusedError(RefusedError):
    """QEMU understood a command and did not do it; the message has QEMU's own words."""

    code = "guest-refused"


class GuestSilentError(UnavailableError):
    """No answer in time, or the connection broke: whether the command was done is not known."""

    code = "guest-silent"


@dataclass(frozen=True, slots=True)
class Event:
    """`number` counts the events of a monitor, from 1."""

    number: int
    name: str
    data: Mapping[str, Any]


class _Latest(EventListener):
    """Keeps the last events, where the library's own listener would keep all there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.latest: deque[Event] = deque(maxlen=EVENTS)
        self.changed = asyncio.Condition()

    async def put(self, event: Message) -> None:
        self.seen += 1
        data = cast("Mapping[str, Any]", event.get("data", {}))
        self.latest.append(Event(self.seen, str(event["event"]), data))
        async with self.changed:
            self.changed.notify_all()


class _Client(QMPClient):
    """Reads what QEMU says, for those who have written their commands to its connection themselves: the library's own
    way takes a task and several queues for each, and writes each message out for a log that nobody keeps, while guests
    stand still."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._expected: dict[str, asyncio.Future[Message]] = {}

    def expect(self, ids: Iterable[str]) -> dict[str, asyncio.Future[Message]]:
        """The answers to commands with these ids, or ConnectionError once there can be none."""
        loop = asyncio.get_running_loop()
        answers = {id_: loop.create_future() for id_ in ids}
        self._expected |= answers
        return answers

    def expect_no_more(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            if (answer := self._expected.pop(id_, None)) is not None:
                answer.cancel()

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    async def _on_message(self, msg: Message) -> None:
        answer = self._expected.pop(str(msg.get("id")), None)
        if answer is None:
            await super()._on_message(msg)
        elif not answer.done():
            answer.set_result(msg)

    async def _bh_disconnect(self) -> None:
        try:
            await super()._bh_disconnect()
        finally:
            for answer in self._expected.values():
                if not answer.done():
                    answer.set_exception(ConnectionResetError())


class Monitor:
    """An open monitor. Not thread-safe; commands of several tasks are answered in the order they were sent."""

    def __init__(
        self, path: Path, client: _Client, connection: socket.socket, heard: _Latest, allowed: frozenset[str]
    ) -> None:
        self.path = path
        self._allowed = allowed
        self._client = client
        self._socket = connection
        self._heard = heard
        self._numbers = itertools.count(1)

    @classmethod
    async def connect(cls, path: Path, timeout_s: float = CONNECT_S, allowed: frozenset[str] = ALLOWED) -> Self:
        """Take the monitor at a unix socket, for no other commands than those `allowed`. NotFoundError, RefusedError,
        UnavailableError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        spoken_on = connection.dup()
        client, heard = _Client(path.name), _Latest()
        client.events.event_filter = lambda event: False
        client.register_listener(heard)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(connection, str(path))
                await client.connect(spoken_on)
        except BaseException as error:
            with contextlib.suppress(Exception):
                await client.disconnect()
            for one in (connection, spoken_on):
                one.close()
            refusal = _refusal(path, error)
            if refusal is None:
                raise
            raise refusal from error
        return cls(path, client, connection, heard, allowed)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, timeout_s: float = ANSWER_S
    ) -> Any:
        """What QEMU returns. GuestRefusedError; GuestSilentError, after which the monitor is to be closed."""
        return (await self.execute_all([(command, arguments or {})], timeout_s))[0]

    async def execute_all(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """What QEMU returns to each; said in one write, they cost one wait for an answer. They are done in this order,
        those after one that fails as well; then the error of the first that does is raised, once all are answered."""
        asked = {f"{_ASKED}{next(self._numbers)}": command for command in commands}
        words = b"".join(self._line(name, arguments, id_) for id_, (name, arguments) in asked.items())
        answers = self._client.expect(asked)
        try:
            self._write(words)
            async with asyncio.timeout(timeout_s):
                told = await asyncio.gather(*answers.values())
        except TimeoutError as error:
            unanswered = ", ".join(asked[id_][0] for id_, answer in answers.items() if answer.cancelled())
            raise GuestSilentError(
                f"{self.path} has not answered {unanswered} for {timeout_s:g} s", "look whether its QEMU hangs"
            ) from error
        except ConnectionError as error:
            names = ", ".join(name for name, _ in commands)
            raise GuestSilentError(
                f"{self.path} went away during {names}", "look whether its QEMU has ended"
            ) from error
        finally:
            self._client.expect_no_more(answers)
        for (name, _), answer in zip(commands, told, strict=True):
            if "error" in answer:
                raise GuestRefusedError(
                    f"{self.path} refused {name}: {cast('dict[str, str]', answer['error'])['desc']}"
                )
        return [answer["return"] for answer in told]

    def say(self, commands: Sequence[Command]) -> None:
        """All in one write, so that nothing the guard says comes in between. What becomes of them is to be asked for;
        it is known when the next command is answered. GuestSilentError."""
        self._write(b"".join(self._line(name, arguments, _SAID) for name, arguments in commands))

    def _write(self, words: bytes) -> None:
        if not self.is_open:  # nobody would read the answer
            raise GuestSilentError(f"{self.path} went away", "look whether its QEMU has ended")
        try:
            said = self._socket.send(words)
        except BlockingIOError:
            said = 0
        except OSError as error:
            raise GuestSilentError(f"{self.path} went away", "look whether its QEMU has ended") from error
        if said < len(words):
            raise GuestSilentError(f"{self.path} does not listen", "look whether its QEMU hangs")

    async def yank(self, nodes: Sequence[str]) -> None:
        """Break the connections of these nodes to their servers; heard while QEMU waits for one of them, too (QAPI,
        yank, out of band). FlushpointError."""
        self._refuse_unlisted("yank")
        instances = [{"type": "block-node", "node-name": node} for node in nodes]
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._client.execute("yank", {"instances": instances}, oob=True)
        except ExecuteError as error:
            raise GuestRefusedError(f"{self.path} refused yank: {error}") from error
        except (TimeoutError, QMPError) as error:
            raise GuestSilentError(f"{self.path} did not hear yank", "look whether its QEMU hangs") from error

    def _line(self, command: str, arguments: Mapping[str, object], id_: str) -> bytes:
        self._refuse_unlisted(command)
        return json.dumps({"execute": command, "arguments": arguments, "id": id_}).encode() + b"\n"

    def _refuse_unlisted(self, command: str) -> None:
        if command not in self._allowed:
            raise ValueError(f"{command} is not on the list of commands that may be sent")

    @property
    def is_open(self) -> bool:
        """Whether its QEMU has not ended the connection, as it does when it ends itself."""
        return self._client.runstate is Runstate.RUNNING

    @property
    def heard(self) -> int:
        """The number of the last event so far. What came before a command's answer is counted when it returns."""
        return self._heard.seen

    def events_since(self, number: int) -> Sequence[Event]:
        """Those after event `number`; GuestSilentError if some of them are forgotten, so that nobody concludes from
        their absence."""
        latest = self._heard.latest
        if self._heard.seen - number > len(latest):
            raise GuestSilentError(f"{self.path} tells of too much at once", "look at what its QEMU reports")
        return [event for event in latest if event.number > number]

    async def wait_for(self, names: frozenset[str], since: int, timeout_s: float) -> Event | None:
        """The first such event after event `since`; None when time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._heard.changed:
                while True:
                    for event in self.events_since(since):
                        if event.name in names:
                            return event
                    await self._heard.changed.wait()
        return None

    def fileno(self) -> int:
        """Of the connection, to be duplicated for the guard."""
        return self._socket.fileno()

    def user_of_qemu(self) -> tuple[int, int]:
        """uid and gid of the process at the other end (unix(7), SO_PEERCRED): who has to be able to open our files."""
        _, uid, gid = self._peer()
        return uid, gid

    def pid_of_qemu(self) -> int:
        """Of the process that made the monitor's socket: QEMU itself, unless somebody else has opened it for it."""
        return self._peer()[0]

    def process(self) -> str:
        """What tells that process from every other one that has had its number; "" if it cannot be seen from here."""
        pid = self.pid_of_qemu()
        try:
            started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5), starttime
        except (OSError, IndexError):
            return ""
        return f"{pid}@{started}"

    def _peer(self) -> tuple[int, int, int]:
        return _PEER.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))

    async def close(self) -> None:
        """Give the monitor back. What was inserted stays where it is."""
        with contextlib.suppress(Exception):  # however its connection ended: it is not used any more
            await self._client.disconnect()
        self._socket.close()


def _refusal(path: Path, error: BaseException) -> FlushpointError | None:
    cause = error.exc if isinstance(error, ConnectError) else error
    match cause:
        case FileNotFoundError():
            return NotFoundError(f"there is no monitor at {path}", "start the guest, or name its QMP socket")
        case ConnectionRefusedError():
            return NotFoundError(f"nobody listens at {path}: its guest has ended", "start the guest")
        case PermissionError():
            return RefusedError(f"{path} must not be opened by the agent's user", "run the agent as the guest's user")
        case TimeoutError():
            return UnavailableError(
                f"{path} does not greet: another client holds this monitor, or its QEMU hangs",
                "give the guest a monitor for Flushpoint alone: -qmp unix:PATH,server=on,wait=off",
            )
        case OSError() | EOFError() | QMPError():
            return UnavailableError(f"{path} broke off: {cause}", "look whether it is a QMP monitor of a running guest")
        case _:
            return None
