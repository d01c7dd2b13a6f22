"""Certificates for tests of TLS, named as QEMU names them."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_pki(directory: Path, *names: str) -> Path:
    """An authority, a server of these names (DNS:… or IP:…), and a client."""
    authority = ("-keyout", f"{directory}/ca-key.pem", "-out", f"{directory}/ca-cert.pem", "-days", "1")
    _run("openssl", "req", "-x509", *_CURVE, *authority, "-subj", "/CN=authority", "-addext",
        "keyUsage=critical,keyCertSign")  # fmt: skip
    signed(directory, "server", f"subjectAltName={','.join(names)}", "extendedKeyUsage=serverAuth")
    signed(directory, "client", "extendedKeyUsage=clientAuth")
    return directory


def signed(pki: Path, name: str, *extensions: str) -> None:
    """`name`-cert.pem and `name`-key.pem, signed by the directory's authority."""
    key, request, certificate = (str(pki / f"{name}-{kind}.pem") for kind in ("key", "request", "cert"))
    _run("openssl", "req", *_CURVE, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    (pki / "extensions").write_text("\n".join(extensions))
    authority = ("-CA", f"{pki}/ca-cert.pem", "-CAkey", f"{pki}/ca-key.pem", "-CAcreateserial")
    _run("openssl", "x509", "-req", "-in", request, *authority, "-out", certificate, "-days", "1",
        "-extfile", f"{pki}/extensions")  # fmt: skip


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)
