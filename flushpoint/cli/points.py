"""Recovery points: list them, restore, verify, serve and prune."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.model.errors import DamagedError, FlushpointError, NotFoundError, UsageError
from coordinator.model.job import JobSpec, Sync
from coordinator.model.point import MirroredDisk, PointMember, PointRecord, Retention
from coordinator.model.repository_uri import LATEST, RepositoryUri, parse_repository
from coordinator.model.task import RepositoryTask, TaskKind
from coordinator.model.uri import FORMATS, NOWHERE, absolute
from coordinator.model.view import JobView
from flushpoint.cli import output, session, waiting
from flushpoint.cli.groups import repository_of

RepositoryOption = Annotated[
    str,
    typer.Option(
        "--repository",
        "-r",
        envvar="FLUSHPOINT_REPOSITORY",
        metavar="URI",
        help="Where the points are: s3://bucket/prefix or repo+file:///dir; ?key=file:/… if it is encrypted. By default"
        " where the group's file says.",
    ),
]
PointArgument = Annotated[str, typer.Argument(metavar="GROUP[@POINT]", help="A point; without @POINT the newest.")]
DiskOption = Annotated[str, typer.Option("--disk", metavar="VM/DISK", help="Only this disk of the point.")]


def register(app: typer.Typer) -> None:
    for command in (points, restore, verify, serve, prune):
        app.command()(command)


def points(
    group: Annotated[str, typer.Argument(help="The group, or the name a single disk was mirrored by.")],
    repository: RepositoryOption = "",
    as_json: output.JsonOption = False,
) -> None:
    """List the recovery points of a group, oldest first."""
    known = _scanned(parse_repository(repository_of(group, repository)), group)
    found = _points_of(known, group)
    if as_json:
        print(json.dumps([point.model_dump(mode="json") for point in found]))
    else:
        print(_table(found))
    if known.begun:
        output.say(
            f"the targets of {group} are INCONSISTENT: {group}@{known.begun} is written there, or was and given up"
        )
    for epoch in known.damaged:
        output.say(str(known.damage(epoch)))
    if known.damaged:
        raise typer.Exit(DamagedError.exit_code)


def restore(
    point: PointArgument,
    to: Annotated[
        list[str],
        typer.Option("--to", metavar="PLACE", help="A directory, a disk's name or URI, or VM/DISK=PLACE for each."),
    ],
    repository: RepositoryOption = "",
    disk: DiskOption = "",
    image_format: Annotated[str, typer.Option("--format", help="Of files made in a directory: raw or qcow2.")] = "raw",
    update: Annotated[
        bool, typer.Option("--update", help="The targets hold older data: read it and write only what differs.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Existing files may be overwritten.")] = False,
    speed: Annotated[str, typer.Option(metavar="RATE", help="Bytes per second for each disk.")] = "0",
    as_json: output.JsonOption = False,
) -> None:
    """Copy the disks of a recovery point back, checking the digest of every block on the way."""
    from flushpoint.cli.mirror import parse_rate

    if image_format not in FORMATS:
        raise UsageError(f"{image_format!r} is no format of a file", "write raw or qcow2")
    uri, chosen = _chosen(repository, point, disk)
    places = _places(to, [m.disk for m in chosen.members if disk in ("", m.disk)], image_format)
    specs = [
        JobSpec(
            source=str(replace(uri, disk=name)),
            target=place,
            sync=Sync.INCREMENTAL if update else Sync.FULL,
            overwrite=overwrite,
            speed=parse_rate(speed),
        )
        for name, place in places.items()
    ]
    _run_all(specs, as_json)


def verify(
    point: PointArgument, repository: RepositoryOption = "", disk: DiskOption = "", as_json: output.JsonOption = False
) -> None:
    """Read every block of a recovery point and compare it with its digest. Exit code 5: damage was found."""
    uri, chosen = _chosen(repository, point, disk)
    names = [m.disk for m in chosen.members if disk in ("", m.disk)]
    _run_all([JobSpec(source=str(replace(uri, disk=name)), target=NOWHERE) for name in names], as_json)


def serve(
    point: PointArgument,
    repository: RepositoryOption = "",
    disk: DiskOption = "",
    socket: Annotated[str, typer.Option(metavar="PATH", help="Unix socket to listen on; else one is made.")] = "",
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="TCP address to listen on instead.")] = "",
    tls_certificates: Annotated[
        str, typer.Option(metavar="DIR", help="Take TLS only; DIR has server-cert.pem and server-key.pem.")
    ] = "",
    tls_verify_peer: Annotated[
        bool, typer.Option("--tls-verify-peer", help="Take only clients with a certificate by DIR's ca-cert.pem.")
    ] = False,
    writable: Annotated[
        str, typer.Option(metavar="DIR", help="Take writes too, into an overlay in DIR; the point stays as it is.")
    ] = "",
    as_json: output.JsonOption = False,
) -> None:
    """Offer the disks of a recovery point as NBD exports, at once, until interrupted. With --repository, needs no
    coordinator.

    Prints the URI of each, a line each, or all of them as JSON in one line; and on stderr how to boot a VM from them.
    """
    from flushpoint.supervisor import DEFAULTS

    group, number = _parsed(point)
    uri = str(replace(parse_repository(repository_of(group, repository)), group=group, point=number))
    here = Path.cwd()
    options = [
        *(("--disk", disk) if disk else ()),
        *(("--socket", str(here / socket)) if socket else ()),
        *(("--listen", listen) if listen else ()),
        *(("--tls-certificates", str(here / tls_certificates)) if tls_certificates else ()),
        *(("--tls-verify-peer",) if tls_verify_peer else ()),
        *(("--writable", str(here / writable)) if writable else ()),
        *(("--json",) if as_json else ()),
    ]
    # The parts are run by their commands; -P, so that the directory it is started in shadows no module.
    command = [sys.executable, "-P", "-m", "workers.repository.serve", uri, *options]
    os.execve(sys.executable, command, {"FLUSHPOINT_DEFAULTS": json.dumps(DEFAULTS), **os.environ})


def prune(
    group: Annotated[str, typer.Argument(help="The group.")],
    repository: RepositoryOption = "",
    keep_last: Annotated[int, typer.Option(min=0)] = 0,
    keep_hourly: Annotated[int, typer.Option(min=0)] = 0,
    keep_daily: Annotated[int, typer.Option(min=0)] = 0,
    keep_weekly: Annotated[int, typer.Option(min=0)] = 0,
    keep_monthly: Annotated[int, typer.Option(min=0)] = 0,
    forget_damaged: Annotated[
        bool, typer.Option("--forget-damaged", help="Remove points whose own record is damaged, which no backup mends.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Remove the points that no rule keeps (never the newest or one in use), and what only they led to.

    What only they led to goes in two steps: it is marked now and removed by a later prune, when nobody can need it.
    While the record of a point is damaged nothing is removed, for nobody can tell what it leads to; --forget-damaged
    gives that point up for ever.
    """
    retention = Retention(
        last=keep_last, hourly=keep_hourly, daily=keep_daily, weekly=keep_weekly, monthly=keep_monthly
    )
    if retention.keeps_all:
        raise UsageError("nothing says which points to keep", "give --keep-last N, --keep-daily N or another")
    task = RepositoryTask(
        kind=TaskKind.PRUNE,
        repository=repository_of(group, repository),
        groups=(group,),
        retention=retention,
        forget_damaged=forget_damaged,
        dry_run=dry_run,
    )
    result = run_task(task)
    if as_json:
        print(json.dumps(result))
        return
    for epoch, why in sorted(((int(e), why) for e, why in result["kept"].get(group, {}).items())):
        print(f"keep   {group}@{epoch}  {why}")
    for epoch in result["removed"].get(group, []):
        print(f"{'would remove' if dry_run else 'remove'} {group}@{epoch}")
    for epoch in result["forgotten"].get(group, []):
        print(f"{'would forget' if dry_run else 'forget'} {group}@{epoch}  damaged")
    if not dry_run:
        output.say(
            f"{result['condemned']} objects ({output.size_text(result['condemned_bytes'])}) marked, "
            f"{result['deleted']} ({output.size_text(result['deleted_bytes'])}) removed"
        )


class TaskFailedError(FlushpointError):
    """The job of a task failed or was cancelled; `found` is what it had to tell all the same."""

    def __init__(self, job: JobView) -> None:
        super().__init__(job.error or f"job {job.id} was cancelled")
        self.code = job.error_code or self.code
        self.exit_code = waiting.exit_code_of(job)
        self.found: dict[str, Any] = json.loads(job.result) if job.result else {}


def run_task(task: RepositoryTask) -> dict[str, Any]:
    """Do a task as a job and give back what it tells; its error is raised as if it had happened here."""
    with session.connect() as client:
        job = waiting.until_rest(client, client.submit(JobSpec(task=task)).id, as_json=False)
    if job.failed or job.cancelled:
        raise TaskFailedError(job)
    found: dict[str, Any] = json.loads(job.result)
    return found


@dataclass(frozen=True, slots=True)
class _Known:
    """What a scan told of one group: epochs of its points, and what is said of those whose manifests are damaged."""

    repository: str
    epochs: list[int]
    """Ascending."""
    damaged: dict[int, str]
    begun: int = 0
    """A later epoch that was written to the group's targets, or may have been; 0: none."""

    def damage(self, epoch: int) -> DamagedError:
        there = ", ".join(str(e) for e in self.epochs[-10:])
        return DamagedError(self.damaged[epoch], f"the newest that can be read are {there}" if there else "")


def _scanned(uri: RepositoryUri, group: str) -> _Known:
    """The group as the repository has it now; the ledger is told of it. NotFoundError if it has no points."""
    task = RepositoryTask(kind=TaskKind.SCAN, repository=str(uri.repository), groups=(group,))
    result = run_task(task)
    epochs = result["groups"].get(group, [])
    damaged = {int(epoch): message for epoch, message in result["damaged"].get(group, {}).items()}
    if not epochs and not damaged:
        raise NotFoundError(f"there is no point of group {group!r}", "see flushpoint repository scan for the groups")
    return _Known(result["repository"], epochs, damaged, result["begun"].get(group, 0))


def _points_of(known: _Known, group: str) -> list[PointRecord]:
    there = set(known.epochs)
    with session.connect() as client:
        return [point for point in client.points(known.repository, group) if point.epoch in there]


def _table(found: list[PointRecord]) -> str:
    head = ("POINT", "AGE", "CONSISTENCY", "DISKS", "SIZE", "STORED", "HOW")
    rows = [
        (
            str(point.epoch),
            output.duration_text(max(0.0, time.time() - point.cut_at)),
            point.consistency or _seeded(point),
            str(len(_whole(point))),
            output.size_text(sum(m.size for m in _whole(point))),
            output.size_text(sum(m.bytes_sent for m in _whole(point))),
            ", ".join(dict.fromkeys(m.sync for m in _whole(point))),
        )
        for point in found
    ]
    return output.table([head, *rows])


def _whole(point: PointRecord) -> list[PointMember | MirroredDisk]:
    """Its disks, in the repository and at targets."""
    return [*point.members, *(disk for disk in point.mirrors if not disk.seeded)]


def _seeded(point: PointRecord) -> str:
    """Of a manifest that is no point yet, how far it is on the way to one."""
    parts = [(disk.seeded, disk.size) for disk in point.seeding]
    parts += [(disk.seeded, disk.size) for disk in point.mirrors if disk.seeded]
    done, all_of_it = (sum(part[n] for part in parts) for n in (0, 1))
    return f"seeding, {100 * done // max(1, all_of_it)} %"


def _newest(known: _Known, group: str) -> PointRecord | None:
    """Of those that have a disk; None if there is none."""
    with session.connect() as client:
        for epoch in sorted(known.epochs, reverse=True):
            point = next(client.points(known.repository, group, after=epoch - 1), None)
            if point is not None and point.members:
                return point
    return None


def _chosen(repository: str, point: str, disk: str) -> tuple[RepositoryUri, PointRecord]:
    """The point that was named, and its URI."""
    group, number = _parsed(point)
    uri = parse_repository(repository_of(group, repository))
    known = _scanned(uri, group)
    epoch = number
    if number == LATEST:
        newest = _newest(known, group)
        epoch = max([newest.epoch if newest else 0, *known.damaged])
        if epoch == 0:
            raise NotFoundError(
                f"no point of group {group!r} is in the repository",
                f"see flushpoint points {group}: its disks are seeded, or go to targets of their own",
            )
    if epoch in known.damaged:
        raise known.damage(epoch)
    if epoch not in known.epochs:
        there = ", ".join(str(e) for e in known.epochs[-10:])
        raise NotFoundError(f"group {group!r} has no point {number}", f"the newest are {there}")
    with session.connect() as client:
        chosen = next(client.points(known.repository, group, after=epoch - 1), None)
    if chosen is None or chosen.epoch != epoch:
        raise NotFoundError(
            f"{group}@{epoch} was removed just now", f"see flushpoint points {group} for those there are"
        )
    if not chosen.members and chosen.mirrors:
        where = ", ".join(disk.target for disk in chosen.mirrors)
        raise NotFoundError(f"{group}@{epoch} is not in the repository, but was at {where}", "take it from there")
    if not chosen.members:
        raise NotFoundError(f"{group}@{epoch} is no point yet: {_seeded(chosen)}", "wait for the first point")
    for one in chosen.seeding:
        output.say(f"{group}@{epoch} is without {one.disk}, of which {one.seeded} of {one.size} bytes were copied then")
    if disk and chosen.member(disk) is None:
        there = ", ".join(m.disk for m in chosen.members)
        raise NotFoundError(f"{group}@{chosen.epoch} has no disk {disk!r}", f"it has {there}")
    return replace(uri, group=group, point=chosen.epoch), chosen


def _parsed(text: str) -> tuple[str, int]:
    group, _, number = text.partition("@")
    if number in ("", "latest"):
        return group, LATEST
    if not number.isdigit():
        raise UsageError(f"{text!r} names no recovery point", "write GROUP@NUMBER, or GROUP for the newest")
    return group, int(number)


def _places(to: list[str], disks: list[str], image_format: str) -> dict[str, str]:
    """Where each disk goes."""
    here = str(Path.cwd())
    mapped = dict(entry.split("=", 1) for entry in to if entry.partition("=")[0] in disks and "=" in entry)
    rest = [entry for entry in to if entry.partition("=")[0] not in disks or "=" not in entry]
    if len(rest) > 1:
        raise UsageError(f"--to names two places: {rest[0]} and {rest[1]}", "write VM/DISK=PLACE for each disk")
    missing = [disk for disk in disks if disk not in mapped]
    if missing and not rest:
        raise UsageError(
            f"--to names no place for {', '.join(missing)}", "write VM/DISK=PLACE for each, or a directory"
        )
    for disk in missing:
        place = rest[0]
        if Path(place).is_dir() or place.endswith("/") or len(disks) > 1:
            file = Path(place) / f"{disk}.{image_format}"
            file.parent.mkdir(parents=True, exist_ok=True)  # a VM's disks in a directory of its own
            place = str(file)
        mapped[disk] = place
    return {disk: absolute(place, here) for disk, place in mapped.items()}


def _run_all(specs: list[JobSpec], as_json: bool) -> None:
    """All jobs side by side; the gravest of their exit codes."""
    code = 0
    jobs: list[JobView] = []
    with session.connect() as client:
        for job_id in [client.submit(spec).id for spec in specs]:
            job = waiting.until_rest(client, job_id, as_json)
            jobs.append(job)
            output.say(waiting.ending(job))
            code = max(code, waiting.exit_code_of(job))
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in jobs]))
    raise typer.Exit(code)
