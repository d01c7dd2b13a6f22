"""Certificates for the tests of TLS, made for each module; and no log lines between tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.certificates import make_pki


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """The server's threads log also while pytest captures nothing, between two tests."""
    with capture_logs():
        yield


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server called localhost (and 127.0.0.1), and a client."""
    return make_pki(tmp_path_factory.mktemp("pki"), "DNS:localhost", "IP:127.0.0.1")
