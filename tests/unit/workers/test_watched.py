"""A reader that hangs is killed by the guard, and no other process ever is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.errors import UnavailableError
from tests.guards import serving_guard
from workers.agent import watched
from workers.agent.guard import GuardLink
from workers.agent.watched import BEAT_S, DUE_S, SILENT_S, has_hung_up

READER = """
import os, signal, sys, time
from pathlib import Path
from workers.agent.guard import GuardLink
from workers.agent.watched import BEAT_S

link = GuardLink(Path(sys.argv[1]))
for beat in range(int(sys.argv[2])):
    link.watch("db")
    time.sleep(BEAT_S)
link.watch("db")
print("silent", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""
SPARE_S = 5.0
"""What a busy machine may add."""


@pytest.fixture
def guard(tmpfs_path: Path) -> Iterator[Path]:
    """Where one listens."""
    with serving_guard(tmpfs_path / "guard") as path:
        yield path


def reader(guard: Path, beats: int = 0) -> subprocess.Popen[str]:
    """Says so often that it lives; then it has just hung."""
    words = [sys.executable, "-c", READER, str(guard), str(beats)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "silent\n"
    return process


def killed_after(process: subprocess.Popen[str]) -> float:
    """Seconds. AssertionError if it is not."""
    begun = time.monotonic()
    with process:
        try:
            process.wait(SILENT_S + SPARE_S)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    took_s = time.monotonic() - begun
    assert took_s < SILENT_S + SPARE_S, "the test has killed it"
    return took_s


def test_a_reader_that_is_silent_is_killed_and_one_that_speaks_is_not(guard: Path) -> None:
    """For longer than it may be silent it says that it lives."""
    assert killed_after(reader(guard, beats=round(1.5 * SILENT_S / BEAT_S))) > SILENT_S - BEAT_S


def test_one_whose_guest_has_to_run_again_is_killed_sooner(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "SILENT_S", 60.0)
    process, link = reader(guard), GuardLink(guard)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link.freeze("db", ours.fileno(), 0.1)
        assert killed_after(process) > DUE_S - BEAT_S
        assert b'"cont"' in theirs.recv(4096)
    link.close()


def test_a_process_that_cannot_be_told_from_others_is_not_watched(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor ever killed by its number."""
    monkeypatch.setattr(os, "pidfd_open", lambda pid: (_ for _ in ()).throw(OSError()))
    link = GuardLink(guard)
    with pytest.raises(UnavailableError, match="cannot be told from other processes"):
        link.watch("db")
    link.close()


def test_a_process_that_has_ended_is_known_by_its_connection() -> None:
    """Its number may be another's by the time that the guard looks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.send(b"its last word")
        assert not has_hung_up(ours)
        theirs.close()
        assert has_hung_up(ours)
