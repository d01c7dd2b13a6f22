"""`python -m workers.repository.serve`: a recovery point as NBD exports, until told to stop. Needs no coordinator.

Prints one URI for each disk on standard output when all of them can be connected to, and nothing else there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from coordinator.logs import configure_logs
from coordinator.model.errors import FlushpointError, RefusedError, UsageError
from coordinator.model.point import Decision
from coordinator.model.repository_uri import RepositoryUri, parse_repository
from coordinator.settings import load_settings
from workers.access import Access
from workers.nbd.endpoint import Endpoint, Tls
from workers.nbd.served import ServedDisk
from workers.nbd.server import Server, listen
from workers.nbd.server_handshake import ServerTls
from workers.repository.boot import Served, boot_hints
from workers.repository.decisions import HOLD_RENEW_S, Hold
from workers.repository.repository import Repository
from workers.repository.served_point import Overlay, ServedPoint

_LAST_PORT = 65535
READ_AHEAD_BYTES = 1024 * 1024
"""What one read fetches at once. A booting guest reads here and there; whoever reads all of it waits for no more."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flushpoint serve", description=__doc__)
    parser.add_argument("uri", help="the repository with ?group=…&point=…")
    parser.add_argument("--disk", default="", help="only this disk")
    parser.add_argument("--socket", default="", help="unix socket to listen on")
    parser.add_argument("--listen", default="", metavar="HOST:PORT", help="TCP address to listen on instead")
    parser.add_argument("--tls-certificates", default="", metavar="DIR", help="take only clients that speak TLS")
    parser.add_argument("--tls-verify-peer", action="store_true", help="and that show a certificate of ours")
    parser.add_argument("--writable", default="", metavar="DIR", help="keep writes in an overlay in DIR")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of URIs")
    given = parser.parse_args(argv)
    configure_logs("serve")
    try:
        settings = load_settings()
        access = Access(settings.allowed_roots, settings.allowed_endpoints)
        _serve(parse_repository(given.uri), given, access)
    except FlushpointError as error:
        print(f"flushpoint: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _serve(uri: RepositoryUri, given: argparse.Namespace, access: Access) -> None:
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with contextlib.ExitStack() as stack:
        repository = stack.enter_context(Repository.open(uri.repository, access))
        point, hold = repository.decisions.hold_point(
            uri.group, uri.point, f"serve-{secrets.token_hex(8)}", f"flushpoint serve on {socket.gethostname()}"
        )
        stack.callback(_let_go, repository, hold)
        exports = _exports(stack, repository, point, given.disk, given.writable, access)
        endpoint = _endpoint(stack, given.socket, given.listen)
        tls = _tls(given, access)
        listener = listen(endpoint)
        port = listener.getsockname()[1] if endpoint.socket_path is None else 0
        stack.enter_context(Server(exports, listener, tls=tls))
        _tell(
            [Served(name, _at(endpoint, port, name, tls), disk.size, disk.read_only) for name, disk in exports.items()],
            given.json,
        )
        while not stopped.wait(HOLD_RENEW_S):
            renewed = hold.model_copy(update={"renewed_at": time.time()})
            with contextlib.suppress(FlushpointError):  # a guest may run on it; the hold is good for an hour
                repository.decisions.hold(renewed)


def _exports(
    stack: contextlib.ExitStack,
    repository: Repository,
    point: Decision,
    disk: str,
    writable: str,
    access: Access,
) -> dict[str, ServedDisk]:
    names = [disk] if disk else [member.disk for member in point.members]
    exports: dict[str, ServedDisk] = {}
    for name in names:
        below = repository.disk(point, name, READ_AHEAD_BYTES)
        if not writable:
            exports[below.name] = ServedPoint(below)
            continue
        directory = Path(access.check_path(writable, must_exist=False))
        try:
            directory.mkdir(exist_ok=True)
            identity = f"{repository.id} {point.group}@{point.epoch} {below.name}"
            overlay = Overlay(below, directory, f"{point.group}@{point.epoch}-{quote(below.name, safe='')}", identity)
        except OSError as error:
            reason = f"cannot keep writes in {directory}: {error.strerror or error}"
            raise RefusedError(reason, "name a directory that can be written") from error
        stack.callback(overlay.close)
        exports[below.name] = overlay
    return exports


def _let_go(repository: Repository, hold: Hold) -> None:
    with contextlib.suppress(FlushpointError):  # it goes stale by itself
        repository.decisions.let_go(hold.id)


def _endpoint(stack: contextlib.ExitStack, path: str, address: str) -> Endpoint:
    if path and address:
        raise UsageError("--socket and --listen name two places", "give one of them")
    if address:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > _LAST_PORT:
            raise UsageError(f"{address!r} is no address to listen on", "write HOST:PORT; port 0 takes a free one")
        return Endpoint(host.strip("[]"), int(port), None, "")
    if not path:
        path = f"{stack.enter_context(tempfile.TemporaryDirectory(prefix='flushpoint-serve-'))}/nbd.sock"
    return Endpoint(None, 0, str(Path(path).absolute()), "")


def _tls(given: argparse.Namespace, access: Access) -> ServerTls | None:
    if not given.tls_certificates:
        if given.tls_verify_peer:
            raise UsageError("--tls-verify-peer wants a directory of certificates", "add --tls-certificates DIR")
        return None
    directory = access.check_path(given.tls_certificates, must_exist=True)
    return ServerTls(directory, demand_client_certificates=given.tls_verify_peer)


def _at(endpoint: Endpoint, port: int, name: str, tls: ServerTls | None) -> Endpoint:
    return Endpoint(endpoint.host, port or endpoint.port, endpoint.socket_path, name, Tls() if tls else None)


def _tell(served: Sequence[Served], as_json: bool) -> None:
    if as_json:
        lines = [{"disk": s.disk, "uri": str(s.at), "size": s.size, "read_only": s.read_only} for s in served]
        print(json.dumps(lines), flush=True)
        return
    for hint in boot_hints(served):
        print(hint, file=sys.stderr)
    for one in served:
        print(one.at, flush=True)


if __name__ == "__main__":
    sys.exit(main())
