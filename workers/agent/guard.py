"""The guard: one process a host that lets guests run again when the agent does not.

::

    agent ── unix socket ──> guard
      hello                                                                  is it there?
      freeze NAME, deadline, jobs, a duplicate of the monitor's descriptor   before `stop` is sent
      freeze-files NAME, deadline, one of the guest agent's connection       before its file systems are frozen
      revert NAME, drives                                                    let it run now, on what it was attached to
      thawed NAME                                                            after the answer to `cont`, or to the thaw
      leave NAME, leave-files NAME, a duplicate                              that answer did not come: the guard's now,
                                                                             and nobody else reads there any more
      watch NAME                                                             said by a reader, again and again
      (the connection ends)                                                  the agent is gone: all its guests, at once

A monitor has one client, so the guard never connects to one: it holds a duplicate of the descriptor the agent speaks
on, and all it ever writes there is `cont`. QEMU answers that to whoever reads the connection, under an id that the
agent does not know and drops. A guest that runs already takes it for nothing, so the guard goes on with it until the
agent says that the guest runs: an agent that sleeps may send its `stop` when it wakes, long after the deadline.

Before `cont`, in the same write, a guest that moves to other images (pivot.py) is told to cancel the jobs for which its
writes would wait; or, where those images do not answer, to attach its devices to what they were attached to. It is the
guard who says this, for it knows whether the guest runs already: an agent might be late, and lose what was written.
It is the same with file systems, where all it ever says is that they be thawed, and asks whether they are. Nothing is
said again while what was said before has not been read, so that a guest that hears nothing finds one command later.

A reader of a guest's QEMU (reader.py) says that it lives. One that is silent is killed: what it leaves unread would
keep QEMU from hearing `cont`.

Of an agent that is gone the guard has the last descriptor, and reads the answer before it closes that: QEMU may notice
the end of a connection first, and drop what it has not read of it.

It is started and ended apart from the agent, in a cgroup of its own, since what kills or stops the one must not meet
the other. It needs neither the ledger nor the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError
from coordinator.settings import load_settings
from workers.agent.held import GUEST_AGENT, MONITOR, Held, Words, attaching, cancelling
from workers.agent.watched import Watched, has_hung_up

MESSAGE_BYTES = 65536
GONE_S = 2.0
"""Between the end of a process's connections and its own, at most."""
_LOOK_S = 0.05
"""How often to look whether it has ended."""
_PEER = struct.Struct("iII")
END_S = 2.0
"""How long a guard that is told to end waits for answers."""
MOST_FREEZES = 4096
_KINDS = {"freeze": MONITOR, "leave": MONITOR, "freeze-files": GUEST_AGENT, "leave-files": GUEST_AGENT}


class Guard:
    """Serves the agents that connect to a unix socket. One thread; every step is short."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """RefusedError if another guard serves that path."""
        self._say = say
        self._freezes: dict[tuple[int, str], Held] = {}
        """By the agent's connection and the guest's name."""
        self._agents: dict[socket.socket, int] = {}
        """Their pidfds, -1 where there is none."""
        self._orphans: dict[socket.socket, Held] = {}
        """By their connections: those that no agent uses any more."""
        self._ending: list[_Ending] = []
        self._watched: dict[socket.socket, Watched] = {}
        """By their connections."""
        self._selector = selectors.DefaultSelector()
        self._listener = _listen(path)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def run(self, until: Callable[[], bool]) -> None:
        """Until `until` says so; it is asked at least once a second."""
        while not until():
            self._step(self._wait_s())

    def _step(self, wait_s: float) -> None:
        for key, _ in self._selector.select(wait_s):
            ready = key.fileobj
            assert isinstance(ready, socket.socket)
            if ready is self._listener:
                self._accept()
            elif ready in self._orphans:
                self._read_answer(self._orphans[ready])
            else:
                self._hear(ready)
        self._look_at_ending()
        self._thaw_overdue()
        self._kill_silent()

    def close(self) -> None:
        """Nobody is left behind: agents that live still have their monitors, and what they froze is told to run."""
        for freeze in self._freezes.values():
            freeze.ends_at = 0.0
        self._thaw_overdue()
        ends_at = time.monotonic() + END_S
        while self._orphans and time.monotonic() < ends_at:
            self._step(MONITOR.again_s)
        for freeze in self._freezes.values():
            freeze.connection.close()
        for one in self._ending:
            one.close()
        for process in self._agents.values():
            if process >= 0:
                os.close(process)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _wait_s(self) -> float:
        due = self._due()
        ends = [*(freeze.ends_at for freeze in self._all()), *(one.ends_at(due) for one in self._watched.values())]
        return max(0.0, min(_LOOK_S if self._ending else 1.0, min(ends, default=float("inf")) - time.monotonic()))

    def _accept(self) -> None:
        try:
            agent, _ = self._listener.accept()
        except OSError as error:  # out of descriptors, say: those who are there are more important
            self._say(f"cannot take a connection: {error.strerror}")
            time.sleep(_LOOK_S)  # it stays ready
            return
        agent.setblocking(False)
        self._agents[agent] = _process_of(agent)
        self._selector.register(agent, selectors.EVENT_READ)

    def _hear(self, agent: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(agent, MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._selector.unregister(agent)
            self._watched.pop(agent, None)
            self._thaw_all_of(agent)
            agent.close()
            return
        try:
            self._obey(agent, json.loads(data), descriptors)
            answer = {"ok": True, "error": ""}
        except (ValueError, KeyError, TypeError, OSError) as error:
            answer = {"ok": False, "error": str(error)}
        for descriptor in descriptors:  # those that were wanted were duplicated
            os.close(descriptor)
        with contextlib.suppress(OSError):  # it is gone, and the next look at it says so
            agent.send(json.dumps(answer).encode())

    def _obey(self, agent: socket.socket, message: dict[str, object], descriptors: list[int]) -> None:
        name = str(message["guest"])
        key = (agent.fileno(), name)
        match message["do"]:
            case "hello":
                pass
            case "freeze" | "freeze-files" as kind:
                deadline_s = float(str(message["deadline_s"]))
                if not 0 < deadline_s <= 60:
                    raise ValueError("a deadline is more than none and at most a minute")
                if key in self._freezes:
                    raise ValueError(f"{name} was not said to run yet")
                ends_at = time.monotonic() + deadline_s
                held = self._held(agent, name, _KINDS[kind], descriptors, ends_at)
                held.before = cancelling(_listed(message.get("cancel", [])))
                self._freezes[key] = held
            case "revert":
                if key not in self._freezes or self._freezes[key].is_told:
                    raise ValueError(f"{name} was let run before")
                self._revert(self._freezes[key], attaching(_mapped(message["drives"])))
            case "thawed":
                if key in self._freezes:
                    self._freezes.pop(key).connection.close()
            case "leave" | "leave-files" as kind:
                left = self._freezes.pop(key, None) or self._held(agent, name, _KINDS[kind], descriptors, 0.0)
                self._take_over(left, "its agent has not heard it say so")
            case "watch":
                if self._agents[agent] < 0 or has_hung_up(agent):
                    raise ValueError(f"the reader of {name} cannot be told from other processes")
                self._watched[agent] = Watched(name, self._agents[agent], time.monotonic())
            case other:
                raise ValueError(f"a guard does not {other}")

    def _revert(self, freeze: Held, before: bytes) -> None:
        """Before it is answered: what the agent says next comes after it."""
        freeze.before, freeze.why = before, "it goes back to where it was"
        if not freeze.tell():
            raise ValueError(f"{freeze.name} does not listen")
        freeze.is_told = True
        self._say(freeze.does)

    def _held(self, agent: socket.socket, name: str, words: Words, descriptors: list[int], ends_at: float) -> Held:
        if len(descriptors) != 1 or len(self._freezes) + len(self._orphans) >= MOST_FREEZES:
            raise ValueError("a freeze comes with the descriptor of one connection")
        return Held(name, agent.fileno(), words, socket.socket(fileno=os.dup(descriptors[0])), ends_at)

    def _take_over(self, freeze: Held, why: str) -> None:
        """Nobody else says anything there any more, or listens."""
        freeze.is_told, freeze.ends_at, freeze.why = False, 0.0, why
        self._orphans[freeze.connection] = freeze
        self._selector.register(freeze.connection, selectors.EVENT_READ)

    def _all(self) -> Iterator[Held]:
        yield from self._freezes.values()
        yield from self._orphans.values()

    def _thaw_overdue(self) -> None:
        for freeze in list(self._all()):
            if freeze.ends_at > time.monotonic():
                continue
            freeze.ends_at = time.monotonic() + freeze.words.again_s
            if freeze.connection not in self._orphans:
                freeze.drop_answers()
            if freeze.tell() and not freeze.is_told:
                freeze.is_told = True
                self._say(freeze.does)

    def _due(self) -> frozenset[str]:
        return frozenset(freeze.name for freeze in self._all() if freeze.is_told)

    def _kill_silent(self) -> None:
        due = self._due()
        for connection, one in list(self._watched.items()):
            if one.ends_at(due) <= time.monotonic():
                one.kill()
                del self._watched[connection]
                self._say(f"killed what reads {one.guest}: it hangs")

    def _thaw_all_of(self, agent: socket.socket) -> None:
        """Its connection has ended. If it has too, nobody could stop one of them again, and nobody else reads what QEMU
        says; else it goes on speaking on its monitors, and nobody else may read there."""
        process = self._agents.pop(agent)
        keys = [key for key, freeze in self._freezes.items() if freeze.agent == agent.fileno()]
        ending = _Ending(process, [self._freezes.pop(key) for key in keys], time.monotonic() + GONE_S)
        self._ending.append(ending)
        self._look_at_ending()
        for freeze in ending.held:
            freeze.tell()
            freeze.why = "its agent has left"
            self._say(freeze.does)

    def _look_at_ending(self) -> None:
        """What agents have left is read by whoever is there: the guard, once its process has ended."""
        for one in list(self._ending):
            if one.has_ended():
                for freeze in one.held:
                    self._take_over(freeze, "its agent is gone")
                one.held = []
            if not one.held or time.monotonic() > one.lives_after:
                self._ending.remove(one)
                one.close()

    def _read_answer(self, freeze: Held) -> None:
        if freeze.is_done():
            self._selector.unregister(freeze.connection)
            del self._orphans[freeze.connection]
            freeze.connection.close()


def _listed(words: object) -> list[str]:
    if not isinstance(words, list):
        raise TypeError("jobs come as a list")
    return [str(word) for word in words]


def _mapped(words: object) -> dict[str, str]:
    if not isinstance(words, dict):
        raise TypeError("drives come by the paths of their devices")
    return {str(path): str(node) for path, node in words.items()}


def _process_of(peer: socket.socket) -> int:
    """A pidfd of the process at the other end, -1 if it cannot be had (pidfd_open(2))."""
    pid, _, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


@dataclass(slots=True)
class _Ending:
    """An agent whose connection has ended, so that its process has or is about to; or it lives on."""

    process: int
    """A pidfd, -1 where there is none."""
    held: list[Held]
    """Told to run. QEMU may notice the end of a connection before it has read that, so the last one who has a
    descriptor reads the answer."""
    lives_after: float
    """Monotonic: a process that is there then has closed its connection and no more, and reads what QEMU says."""

    def has_ended(self) -> bool:
        if self.process < 0:
            return True
        waiting = select.poll()
        waiting.register(self.process, select.POLLIN)
        return bool(waiting.poll(0))

    def close(self) -> None:
        for freeze in self.held:
            freeze.connection.close()
        if self.process >= 0:
            os.close(self.process)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        try:
            other.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
        else:
            listener.close()
            raise RefusedError(f"a guard serves {path} already", "there is one a host; use that")
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old)
    listener.listen(16)
    listener.setblocking(False)
    return listener


def _end(process: int) -> None:
    """One that hangs. It may be somebody else's, who lets nobody end it: then it is left."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
        ended = select.poll()
        ended.register(process, select.POLLIN)
        ended.poll(GuardLink.TIMEOUT_S * 1000)


class GuardSilentError(UnavailableError):
    """It does not answer, and may do later what it was told."""


class GuardLink:
    """The agent's end. Thread-safe; calls take microseconds on a host that is well, and are bounded on one that is not.

    After an error the guard is connected to anew by the next call: it may have been started again.
    """

    TIMEOUT_S = 1.0

    def __init__(self, path: Path) -> None:
        """UnavailableError where no guard serves `path`: without one no guest is ever stopped."""
        self._path = path
        self._turn = threading.Lock()
        self._socket: socket.socket | None = self._connected()

    def freeze(self, guest: str, monitor: int, deadline_s: float, cancel: Sequence[str] = ()) -> None:
        """Before `stop`: from here on the guard will let the guest run after `deadline_s`, these jobs cancelled.
        UnavailableError."""
        message = {"do": "freeze", "guest": guest, "deadline_s": deadline_s, "cancel": list(cancel)}
        self._ask(message, [monitor])

    def check(self) -> None:
        """UnavailableError unless it answers now."""
        self._ask({"do": "hello", "guest": ""}, [])

    def another(self) -> GuardLink:
        """To the same guard, whose questions wait for none of this one's. UnavailableError."""
        return GuardLink(self._path)

    def revert(self, guest: str, drives: Mapping[str, str]) -> None:
        """Let it run, its devices (by path) attached to these nodes before; said when this returns, and `thawed` is to
        follow. UnavailableError: it was let run before, or the guard has ended; then nobody says anything any more. One
        that does not answer is ended for that: it might do it when it wakes, whatever the guest has written by then."""
        with self._turn:
            process = _process_of(self._socket) if self._socket is not None else -1
            try:
                self._say({"do": "revert", "guest": guest, "drives": dict(drives)}, [])
                self._hear()
            except GuardSilentError:  # its connection is open, so the process is no other
                _end(process)
                raise
            finally:
                if process >= 0:
                    os.close(process)

    def freeze_files(self, guest: str, agent: int, deadline_s: float) -> None:
        """Before its file systems are frozen, by the connection to its own agent; else the same."""
        self._ask({"do": "freeze-files", "guest": guest, "deadline_s": deadline_s}, [agent])

    def watch(self, guest: str) -> None:
        """This process reads the guest's QEMU, and is to be killed unless it says so again every BEAT_S.
        UnavailableError: it will not be."""
        self._ask({"do": "watch", "guest": guest}, [])

    def thawed(self, guest: str) -> None:
        """After `cont`, or the thaw. UnavailableError: a guard that is gone has told everybody to run."""
        self._ask({"do": "thawed", "guest": guest}, [])

    def leave(self, guest: str, monitor: int) -> None:
        """It has not said that it runs: the guard goes on with it, also one that was started since. The connection is
        not to be used any more. UnavailableError."""
        self._ask({"do": "leave", "guest": guest}, [monitor])

    def leave_files(self, guest: str, agent: int) -> None:
        """It has not said that its file systems are thawed; else the same."""
        self._ask({"do": "leave-files", "guest": guest}, [agent])

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(self.TIMEOUT_S)
        try:
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            raise UnavailableError(
                f"no guard answers at {self._path} ({error.strerror}), and without one no guest is stopped",
                "start flushpoint guard on this host",
            ) from error
        return connection

    def _ask(self, message: dict[str, object], descriptors: list[int]) -> None:
        with self._turn:
            self._say(message, descriptors)
            self._hear()

    def _say(self, message: dict[str, object], descriptors: list[int]) -> None:
        if self._socket is None:
            self._socket = self._connected()
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            raise self._silent(error) from error

    def _hear(self) -> None:
        if self._socket is None:
            raise UnavailableError(f"the guard at {self._path} has ended", "start it again")
        try:
            answer = json.loads(self._socket.recv(MESSAGE_BYTES) or b"{}")
        except OSError as error:
            raise self._silent(error) from error
        if "ok" not in answer:
            self.close()
            raise UnavailableError(f"the guard at {self._path} has ended", "start it again")
        if not answer["ok"]:
            raise UnavailableError(f"the guard at {self._path} refused: {answer['error']}", "look at its log")

    def _silent(self, error: OSError) -> GuardSilentError:
        self.close()  # a late answer would be taken for that of the next question
        why = error.strerror or str(error)
        return GuardSilentError(f"the guard at {self._path} does not answer ({why})", "look at its log")


def main() -> int:
    """Serve until SIGTERM or SIGINT; what the guard does is told on stderr."""
    ended = threading.Event()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # some for every guest, and every reader
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        path = Path(load_settings().guard_socket)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        guard = Guard(path, lambda text: print(f"guard: {text}", file=sys.stderr, flush=True))
    except OSError as error:
        print(f"flushpoint guard: {error}. Run it as a user who may listen there", file=sys.stderr)
        return RefusedError.exit_code
    except FlushpointError as error:
        print(f"flushpoint guard: {error}", file=sys.stderr)
        return error.exit_code
    try:
        guard.run(ended.is_set)
    finally:
        guard.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
