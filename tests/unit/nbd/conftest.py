"""What the tests of the NBD server share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """The server's threads log also while pytest captures nothing, between two tests."""
    with capture_logs():
        yield
