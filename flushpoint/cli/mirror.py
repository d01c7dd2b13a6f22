"""`flushpoint mirror`: copy a disk and wait for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from coordinator.model.errors import UsageError
from coordinator.model.guest_uri import is_guest_disk
from coordinator.model.job import ErrorPolicy, JobSpec, Sync, parse_bytes
from coordinator.model.repository_uri import is_repository, parse_repository
from coordinator.model.uri import absolute
from flushpoint.cli import guests, output, session, waiting

_OF_GUESTS = frozenset({"source", "target", "speed", "name", "detach", "as_json"})


def register(app: typer.Typer) -> None:
    app.command()(mirror)


def mirror(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="Disk to copy: a path, file://, nbd://, nbds:// or nbd+unix://; or a live guest's, by its monitor:"
            " qemu+unix:///DEVICE?qmp=PATH. Of that a group of its own is made, whose points go to a repository."
        ),
    ],
    target: Annotated[str, typer.Argument(help="The copy, named in the same way.")],
    sync: Annotated[
        Sync, typer.Option(help="Which data: all, the top image's, a bitmap's, or what differs.")
    ] = Sync.FULL,
    bitmap: Annotated[
        str | None, typer.Option(metavar="NAME", help="The dirty bitmap of --sync dirty, or of incremental.")
    ] = None,
    speed: Annotated[str, typer.Option(metavar="RATE", help="Bytes per second, as in 50M; 0 is unlimited.")] = "0",
    on_source_error: Annotated[ErrorPolicy, typer.Option(help="What a read error does.")] = ErrorPolicy.REPORT,
    on_target_error: Annotated[ErrorPolicy, typer.Option(help="What a write error does.")] = ErrorPolicy.REPORT,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="An existing target may be overwritten. Files only: devices and exports are written as they are.",
        ),
    ] = False,
    source_frozen: Annotated[
        bool,
        typer.Option(
            "--source-frozen",
            help="A promise that nobody writes the source. Spares an NBD export or image in use the comparing pass"
            " that makes the copy one of a single moment.",
        ),
    ] = False,
    no_auto_complete: Annotated[
        bool, typer.Option("--no-auto-complete", help="Stay ready until told to complete.")
    ] = False,
    no_auto_finalize: Annotated[
        bool, typer.Option("--no-auto-finalize", help="Stay pending until told to finalize.")
    ] = False,
    name: Annotated[
        str, typer.Option(metavar="GROUP", help="In a repository: the group of the point; else the disk's own name.")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print the job's id and do not wait.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Copy a disk, and wait until the copy is done."""
    here = str(Path.cwd())
    if is_guest_disk(source):
        _refuse_others(context)
        group, group_spec = guests.group_of(source, absolute(target, here), name, parse_rate(speed))
        with session.connect() as client:
            guests.mirror(client, group, group_spec, detach=detach, as_json=as_json)
        return
    try:
        spec = JobSpec(
            source=absolute(source, here),
            target=_named(absolute(target, here), name),
            sync=sync,
            bitmap=bitmap,
            speed=parse_rate(speed),
            on_source_error=on_source_error,
            on_target_error=on_target_error,
            overwrite=overwrite,
            source_frozen=source_frozen,
            auto_complete=not no_auto_complete,
            auto_finalize=not no_auto_finalize,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {reason}" if where else reason, "see flushpoint mirror --help") from error
    with session.connect() as client:
        job = client.submit(spec)
        if not detach:
            waiting.follow(client, job.id, as_json)
        elif as_json:
            output.write_job(job, as_json)
        else:
            print(job.id)


def _refuse_others(context: typer.Context) -> None:
    """UsageError for options that say nothing of a guest's disk."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in _OF_GUESTS:
            raise UsageError(
                f"{parameter.opts[0]} does not go with a live guest's disk: each of its points has what changed since"
                " the one before",
                "leave it out",
            )


def _named(target: str, name: str) -> str:
    if not name:
        return target
    if not is_repository(target):
        raise UsageError("--name goes with a repository as target", "name one: s3://bucket/prefix or repo+file:///dir")
    return str(replace(parse_repository(target), group=name))


def parse_rate(text: str) -> int:
    """'50M' to bytes per second; UsageError names the text."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(str(error), "0 is unlimited") from error
