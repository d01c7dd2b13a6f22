"""What connects to a host's guests, without guests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from coordinator.model.errors import NotFoundError, UnavailableError
from workers.agent.guests import Guests
from workers.agent.journal import Journal

GUEST = Path("/run/vm/db.qmp")
LONG_S = 30.0


class Connecting(Guests):
    """Each connection comes about as `outcomes` say, the last one again and again."""

    def __init__(self, journal: Journal, scratch: Path, *outcomes: Exception | None) -> None:
        super().__init__(SimpleNamespace(), journal, scratch)  # type: ignore[arg-type]
        self.outcomes = list(outcomes)
        self.tries = 0

    async def connected(self, path: Path) -> None:  # type: ignore[override]
        self.tries += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if outcome is not None:
            raise outcome


async def see_it_run(guests: Guests) -> None:
    async with asyncio.timeout(LONG_S):
        await guests._see_it_run(GUEST)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal")
    journal.write(GUEST)
    return journal


def test_a_guest_is_seen_to_until_it_was_connected_to(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.agent.guests.AGAIN_S", 0.0)
    guests = Connecting(journal, tmp_path, UnavailableError("silent"), UnavailableError("silent"), None)
    asyncio.run(see_it_run(guests))
    assert guests.tries == 3
    assert journal.has(GUEST), "an entry that is there by then is that of its next stop"


def test_a_guest_that_has_ended_is_forgotten(journal: Journal, tmp_path: Path) -> None:
    asyncio.run(see_it_run(Connecting(journal, tmp_path, NotFoundError("gone"))))
    assert not journal.has(GUEST)


def test_an_entry_tells_whether_it_is_of_a_process(journal: Journal) -> None:
    assert journal.is_of(GUEST, "7@1"), "of an older agent, which wrote none"
    journal.write(GUEST, "7@1")
    assert journal.is_of(GUEST, "7@1")
    assert journal.is_of(GUEST, ""), "it cannot be seen from here"
    assert not journal.is_of(GUEST, "7@2")
    journal.erase(GUEST)
    assert not journal.is_of(GUEST, "7@1")
