"""Certificates for the tests of TLS, made for each module; and no log lines between tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_servers import run
from structlog.testing import capture_logs


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """The server's threads log also while pytest captures nothing, between two tests."""
    with capture_logs():
        yield


def signed(pki: Path, name: str, *extensions: str) -> None:
    """`name`-cert.pem and `name`-key.pem, signed by the directory's authority."""
    key, request, certificate = (pki / f"{name}-{kind}.pem" for kind in ("key", "request", "cert"))
    run("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key),
        "-out", str(request), "-subj", f"/CN={name}")  # fmt: skip
    (pki / "extensions").write_text("\n".join(extensions))
    run("openssl", "x509", "-req", "-in", str(request), "-CA", str(pki / "ca-cert.pem"), "-CAkey",
        str(pki / "ca-key.pem"), "-CAcreateserial", "-out", str(certificate), "-days", "1",
        "-extfile", str(pki / "extensions"))  # fmt: skip


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server called localhost (and 127.0.0.1), and a client."""
    pki = tmp_path_factory.mktemp("pki")
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-keyout", str(pki / "ca-key.pem"), "-out", str(pki / "ca-cert.pem"), "-days", "1", "-subj", "/CN=authority",
        "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    signed(pki, "server", "subjectAltName=DNS:localhost,IP:127.0.0.1", "extendedKeyUsage=serverAuth")
    signed(pki, "client", "extendedKeyUsage=clientAuth")
    return pki
