"""A guest's own agent, QEMU's (docs/interop/qemu-ga.rst), and of all that it does how it freezes file systems.

It sits behind a socket that QEMU makes for a port of the guest's. A command is a line of JSON and so is its answer;
answers come in the order of the commands. That somebody answers cannot be told from the socket, which takes one client
at a time and what it says whether or not an agent runs in the guest; and what a client before left unread is still in
there. So a client that comes says 0xFF first, at which an agent forgets what it has of a line, and then has a number
said back to it.

What comes out of a guest is the guest's to choose: it is bounded, and quoted with care.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError

ANSWER_S = 2.0
"""For what an agent answers at once; freezing is not of that kind. One that was let alone looks every 0.1 s."""
_LINE_BYTES = 65536
_QUOTED = 200
"""Characters of an agent's own words that are passed on."""


class GuestAgentError(UnavailableError):
    """It did not do what it was told, or did not say that it did."""

    code = "guest-agent"


class GuestAgent:
    """A connection to one. Not thread-safe."""

    def __init__(self, path: Path, connection: socket.socket) -> None:
        self.path = path
        self._socket = connection
        self._heard = b""
        self._client = secrets.token_hex(8)
        self._sent = 0

    @classmethod
    async def connect(cls, path: Path, timeout_s: float = ANSWER_S) -> Self:
        """NotFoundError where no guest is, RefusedError, GuestAgentError; says nothing about who answers: `greet`."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(connection, str(path))
        except OSError as error:
            connection.close()
            raise _refusal(path, error) from error
        except BaseException:
            connection.close()
            raise
        return cls(path, connection)

    async def greet(self, timeout_s: float = ANSWER_S) -> None:
        """It is there, and what it says from now on answers us. GuestAgentError."""
        number = secrets.randbelow(2**31)
        said = await self._say("guest-sync-delimited", {"id": number}, before=b"\xff")
        async with _bounded(timeout_s):
            while True:
                answer = await self._line()
                if answer.get("return") == number:
                    break
        if answer.get("id") != said:
            raise GuestAgentError("the guest agent is too old: it does not repeat what its answers belong to")

    async def send(self, command: str) -> str:
        """What the answer is to be asked for by."""
        return await self._say(command, {}, before=b"")

    async def answer(self, said: str, timeout_s: float = ANSWER_S) -> Any:
        """What it returned; GuestAgentError if it refused or is silent, which does not tell what it has done."""
        async with _bounded(timeout_s):
            while True:
                answer = await self._line()
                if answer.get("id") == said:
                    break
        if "return" not in answer:
            raise GuestAgentError(f"the guest agent refused: {_quoted(answer.get('error'))}")
        return answer["return"]

    async def execute(self, command: str, timeout_s: float = ANSWER_S) -> Any:
        return await self.answer(await self.send(command), timeout_s)

    def fileno(self) -> int:
        """Of the connection, to be duplicated for the guard."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    async def _say(self, command: str, arguments: dict[str, object], before: bytes) -> str:
        self._sent += 1
        said = f"{self._client}-{self._sent}"
        line = json.dumps({"execute": command, "arguments": arguments, "id": said})
        async with _bounded(ANSWER_S):
            await asyncio.get_running_loop().sock_sendall(self._socket, before + line.encode() + b"\n")
        return said

    async def _line(self) -> dict[str, Any]:
        """The next one that is a JSON object; others are what is left of somebody else's answer."""
        while True:
            line, ending, rest = self._heard.partition(b"\n")
            if ending:
                self._heard = rest
                try:
                    said = json.loads(line.rpartition(b"\xff")[2])
                except (ValueError, RecursionError):
                    continue
                if isinstance(said, dict):
                    return said
                continue
            if len(line) > _LINE_BYTES:
                raise GuestAgentError("the guest agent says what is no answer")
            data = await asyncio.get_running_loop().sock_recv(self._socket, _LINE_BYTES)
            if not data:
                raise GuestAgentError("the guest agent's connection was ended")
            self._heard += data


@asynccontextmanager
async def _bounded(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise GuestAgentError(f"the guest agent did not answer for {timeout_s:.2g} s") from error
    except OSError as error:
        raise GuestAgentError(f"the guest agent's connection broke: {error.strerror}") from error


def _refusal(path: Path, error: OSError) -> FlushpointError:
    match error:
        case FileNotFoundError():
            return NotFoundError(f"there is no guest agent's socket at {path}", "start the guest, or name its socket")
        case ConnectionRefusedError():
            return NotFoundError(f"nobody listens at {path}: its guest has ended", "start the guest")
        case PermissionError():
            return RefusedError(f"{path} must not be opened by the agent's user", "run the agent as the guest's user")
        case _:
            return GuestAgentError(f"{path} cannot be connected to: {error.strerror or 'nobody takes the connection'}")


def _quoted(error: object) -> str:
    """An agent's own words, in one line of printable characters."""
    words = error.get("desc") if isinstance(error, dict) else error
    return "".join(letter if letter.isprintable() else " " for letter in str(words)[:_QUOTED])
