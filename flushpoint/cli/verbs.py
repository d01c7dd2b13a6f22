"""The verbs of a job, as in QEMU: pause, resume, set-speed, complete, cancel, finalize, dismiss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.model.view import JobView
from flushpoint.cli import output, session
from flushpoint.cli.mirror import parse_rate

if TYPE_CHECKING:
    from flushpoint.client import Client


def register(app: typer.Typer) -> None:
    for command in (pause, resume, complete, cancel, finalize, dismiss):
        app.command()(command)
    app.command("set-speed")(set_speed)


def pause(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Stop copying for a while; the job keeps its place."""
    _act(job_id, as_json, lambda client, full_id: client.pause(full_id))


def resume(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Go on after a pause or an error."""
    _act(job_id, as_json, lambda client, full_id: client.resume(full_id))


def set_speed(
    job_id: output.JobArgument,
    rate: Annotated[str, typer.Argument(help="Bytes per second, as in 50M; 0 is unlimited.")],
    as_json: output.JsonOption = False,
) -> None:
    """Limit a job, over all its workers."""
    speed = parse_rate(rate)
    _act(job_id, as_json, lambda client, full_id: client.set_speed(full_id, speed))


def complete(
    job_id: output.JobArgument,
    pivot: Annotated[bool, typer.Option("--pivot", help="Switch the guest over to the copy.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """End a ready job with a clean copy; if that cannot be, the job goes on."""
    _act(job_id, as_json, lambda client, full_id: client.complete(full_id, pivot=pivot))


def cancel(
    job_id: output.JobArgument,
    force: Annotated[bool, typer.Option("--force", help="Do not drain requests in flight.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Give a job up; its target is no copy."""
    _act(job_id, as_json, lambda client, full_id: client.cancel(full_id, force=force))


def finalize(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Conclude a pending job."""
    _act(job_id, as_json, lambda client, full_id: client.finalize(full_id))


def dismiss(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Forget a concluded job."""
    with session.connect() as client:
        full_id = session.job_id(client, job_id)
        client.dismiss(full_id)
    if as_json:
        output.write_json({"id": full_id, "dismissed": True})
    else:
        print(f"{full_id}  dismissed")


def _act(text: str, as_json: bool, verb: Callable[[Client, str], JobView]) -> None:
    with session.connect() as client:
        output.write_job(verb(client, session.job_id(client, text)), as_json)
