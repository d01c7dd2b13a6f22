"""The scripted API, for every test of the face."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.flushpoint.fake_api import FakeApi, serve


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The API that $FLUSHPOINT_API names during a test."""
    with serve() as fake:
        monkeypatch.setenv("FLUSHPOINT_API", fake.address)
        yield fake
