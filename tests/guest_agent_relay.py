"""A relay before a guest's agent: what is said to it, and what it says, passes the test, or does not."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.stack import wait_until

Tamper = Callable[["Relay", dict[str, Any], bytes], bytes | None]
"""What becomes of a line: itself, another, or none. May wait, and all that comes after it waits too."""


def passed(relay: Relay, said: dict[str, Any], line: bytes) -> bytes:
    return line


class Relay:
    """Serves one client after another on `path`, each with a connection of its own to the agent's socket."""

    def __init__(self, path: Path, agent: Path, *, command: Tamper = passed, answer: Tamper = passed) -> None:
        self.path = path
        self.release = threading.Event()
        """For who waits in a tamper; set when the relay ends."""
        self.reached = threading.Event()
        self._agent = agent
        self._tampers = (command, answer)
        self._ends = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._listener.settimeout(0.05)
        self._serving = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._serving.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self.release.set()
        self._serving.join(10)
        self._listener.close()

    def say(self, command: str) -> None:
        """To the agent, in place of the client."""
        self._up.sendall(json.dumps({"execute": command, "id": "relay"}).encode() + b"\n")

    def wait_until_reached(self) -> None:
        wait_until(self.reached.is_set, "what the relay waits for")

    def _serve(self) -> None:
        while not self._ends.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with client, socket.socket(socket.AF_UNIX) as self._up:
                self._up.connect(str(self._agent))
                with suppress(ConnectionError):  # a client that closes before it has read all resets; so do agents
                    self._join(client)

    def _join(self, client: socket.socket) -> None:
        ends = {client: (self._up, self._tampers[0]), self._up: (client, self._tampers[1])}
        begun = {client: b"", self._up: b""}
        while not self._ends.is_set():
            for ready in select.select(list(ends), [], [], 0.05)[0]:
                data = ready.recv(65536)
                if not data:
                    return
                *lines, begun[ready] = (begun[ready] + data).split(b"\n")
                other, tamper = ends[ready]
                for line in lines:
                    said = json.loads(line.rpartition(b"\xff")[2])
                    if (passing := tamper(self, said, line)) is not None:
                        other.sendall(passing + b"\n")
