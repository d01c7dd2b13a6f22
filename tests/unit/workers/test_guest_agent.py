"""The client of guest agents against one that says what the test wants: a guest may say anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from coordinator.model.errors import NotFoundError
from workers.agent.guest_agent import GuestAgent, GuestAgentError

Answer = Callable[[dict[str, Any]], bytes]


def told(command: dict[str, Any], **answer: object) -> bytes:
    return json.dumps({**answer, "id": command["id"]}).encode() + b"\n"


def well_behaved(command: dict[str, Any]) -> bytes:
    if command["execute"] == "guest-sync-delimited":
        return b"\xff" + told(command, **{"return": command["arguments"]["id"]})
    return told(command, **{"return": 3})


def after_greeting(says: Answer) -> Answer:
    return lambda command: (well_behaved if "sync" in command["execute"] else says)(command)


def talk(path: Path, answer: Answer, use: Callable[[GuestAgent], Awaitable[Any]]) -> Any:
    """What `use` makes of a connection to an agent that answers so."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(answer(json.loads(line.rpartition(b"\xff")[2])))
        ended.set()

    async def connect() -> Any:
        async with await asyncio.start_unix_server(serve, path):
            try:
                with closing(await GuestAgent.connect(path)) as agent:
                    await agent.greet(2)
                    return await use(agent)
            finally:
                await ended.wait()

    return asyncio.run(connect())


def thaw(agent: GuestAgent) -> Awaitable[Any]:
    return agent.execute("guest-fsfreeze-thaw", 2)


def test_an_answer_is_found_behind_what_others_have_left(tmp_path: Path) -> None:
    left = b'rn": 7}\n{"return": 7}\n[1]\n\n{"error": {"desc": "stray"}}\n{"return": 7, "id": "another"}\n'
    assert talk(tmp_path / "a", lambda command: left + well_behaved(command), thaw) == 3


def test_an_answer_that_came_too_late_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    late = []

    def answer(command: dict[str, Any]) -> bytes:
        if command["execute"] == "guest-fsfreeze-freeze":
            late.append(told(command, **{"return": 1}))
            return b""
        return b"".join(late) + well_behaved(command)

    async def freeze_and_thaw(agent: GuestAgent) -> Any:
        with pytest.raises(GuestAgentError, match=r"did not answer for 0\.2 s"):
            await agent.execute("guest-fsfreeze-freeze", 0.2)
        return await thaw(agent)

    assert talk(tmp_path / "a", answer, freeze_and_thaw) == 3


def test_an_agent_that_does_not_say_what_it_answers_is_not_used(tmp_path: Path) -> None:
    def nameless(command: dict[str, Any]) -> bytes:
        return json.dumps({"return": command["arguments"]["id"]}).encode() + b"\n"

    with pytest.raises(GuestAgentError, match="too old"):
        talk(tmp_path / "a", nameless, thaw)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (
            lambda command: told(command, error={"desc": "no\x1b[31m\nsuch" + "!" * 999}),
            r"refused: no \[31m such!{188}$",
        ),
        (lambda command: told(command, error=None), "refused: None"),
        (lambda command: b"x" * 200_000, "says what is no answer"),
        (lambda command: b"[" * 60_000 + b"\n", r"did not answer for 2 s"),
    ],
)
def test_nothing_that_a_guest_says_does_harm(tmp_path: Path, says: Answer, why: str) -> None:
    with pytest.raises(GuestAgentError, match=why):
        talk(tmp_path / "a", after_greeting(says), thaw)


def test_a_connection_that_ends_is_told_from_silence(tmp_path: Path) -> None:
    async def ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    async def connect() -> None:
        async with await asyncio.start_unix_server(ended, tmp_path / "a"):
            with closing(await GuestAgent.connect(tmp_path / "a")) as agent:
                await agent.greet(2)

    with pytest.raises(GuestAgentError, match="connection was ended"):
        asyncio.run(connect())


def test_a_socket_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no guest agent's socket"):
        asyncio.run(GuestAgent.connect(tmp_path / "a"))
    (tmp_path / "b").touch()
    with pytest.raises(NotFoundError, match="nobody listens"):
        asyncio.run(GuestAgent.connect(tmp_path / "b"))
