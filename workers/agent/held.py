"""Connections that the guard holds duplicates of: what it says on them, and how that is answered."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import sys
import termios
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_READ_BYTES = 65536
_ID = "flushpoint-guard-NUMBER"
_FIRST = "flushpoint-guard"
"""Nobody waits for the answers to these."""


@dataclass(frozen=True, slots=True)
class Words:
    """What is said on a kind of connection; NUMBER in there counts how often."""

    command: bytes
    answer: tuple[bytes, ...]
    """All in one line: it is done."""
    does: str
    again_s: float
    """How often it is said from the deadline on."""
    drops_answers: bool
    """Those that an agent leaves unread which sleeps past its deadline. Otherwise they would hold up who answers."""


def _command(name: str, id_: str, arguments: Mapping[str, str] | None = None) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments or {}, "id": id_}).encode() + b"\n"


def cancelling(jobs: Iterable[str]) -> bytes:
    """What a monitor is told so that these jobs are no more in the way of a running guest."""
    return b"".join(_command("job-cancel", _FIRST, {"id": job}) for job in jobs)


def attaching(drives: Mapping[str, str]) -> bytes:
    """What it is told so that devices, by their paths, are attached to these nodes."""
    sets = [{"path": path, "property": "drive", "value": node} for path, node in drives.items()]
    return b"".join(_command("qom-set", _FIRST, one) for one in sets)


MONITOR = Words(
    command=_command("cont", _ID),
    answer=(f'"{_ID}"'.encode(),),
    does="let {} run",
    again_s=0.2,
    drops_answers=False,  # the agent goes on using it when it wakes, and QEMU keeps what is unread
)
GUEST_AGENT = Words(
    # 0xFF: it forgets a line that its client was killed in the middle of.
    command=b"\xff" + _command("guest-fsfreeze-thaw", "flushpoint-guard") + _command("guest-fsfreeze-status", _ID),
    answer=(f'"{_ID}"'.encode(), b'"thawed"'),
    does="thawed file systems through {}",
    again_s=1.0,  # each time it looks at every file system, and runs what its user wants to be run then
    drops_answers=True,
)


@dataclass(slots=True)
class Held:
    """Of a guest that stands still, or whose files do, until `ends_at` (monotonic) at the latest."""

    name: str
    agent: int
    words: Words
    connection: socket.socket
    """To its monitor, or to its own agent."""
    ends_at: float
    """When it is told to run, and then again and again."""
    before: bytes = b""
    """Commands to be carried out before it runs, each time it is told to."""
    why: str = "its deadline is over"
    is_told: bool = False
    told: int = 0
    """How often; the answer to the last time tells that it is done."""
    heard: bytes = b""
    """The beginning of a line that is being said there, once the agent is gone."""

    @property
    def does(self) -> str:
        return f"{self.words.does.format(self.name)}: {self.why}"

    def tell(self) -> bool:
        """False if nothing is read there now; then it is to be told again. Nothing is said again while what was said
        before is unread, so that a guest that hears nothing finds one command later and not a thousand."""
        if self.is_told and self._is_unread():
            return False
        self.told += 1
        command = self.before + self.words.command.replace(b"NUMBER", b"%d" % self.told)
        try:
            return self.connection.send(command, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) > 0
        except BlockingIOError:
            return False
        except OSError:
            return True  # the guest has ended

    def drop_answers(self) -> None:
        """While an agent sleeps that should read them."""
        if self.is_told and self.words.drops_answers:
            with contextlib.suppress(OSError):
                self.connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)

    def is_done(self) -> bool:
        """Reads what was said: whether it answers what was told last, or there is nobody any more."""
        try:
            data = self.connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        *lines, rest = (self.heard + data).split(b"\n")
        self.heard = rest[-_READ_BYTES:]
        return not data or any(map(self._is_answer, lines))

    def _is_answer(self, line: bytes) -> bool:
        return all(part.replace(b"NUMBER", b"%d" % self.told) in line for part in self.words.answer)

    def _is_unread(self) -> bool:
        """unix(7), SIOCOUTQ: what was sent there and not read."""
        count = fcntl.ioctl(self.connection.fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(count, sys.byteorder) > 0
