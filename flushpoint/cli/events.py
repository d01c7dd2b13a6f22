"""`flushpoint events`: what happened, and what happens."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.model.errors import NotFoundError
from flushpoint.cli import output, session

if TYPE_CHECKING:
    from flushpoint.calls import Event
    from flushpoint.client import Client


def register(app: typer.Typer) -> None:
    app.command()(events)


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens from now on.")] = False,
    job: Annotated[str, typer.Option(metavar="ID", help="Of this job alone.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document a line.")] = False,
) -> None:
    """Show events, oldest first."""
    with session.connect() as client, output.cut_off_quietly():
        for event in client.events(job=_named(client, job) if job else "", follow=follow):
            if as_json:
                output.write_json(event.model_dump(mode="json"))
            else:
                print(_line(event), flush=True)


def _named(client: Client, text: str) -> str:
    """The id of a job, or of one that was dismissed: its events are still there."""
    try:
        return session.job_id(client, text)
    except NotFoundError:
        if next(client.events(job=text), None) is None:
            raise
        return text


def _line(event: Event) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    data = " ".join(f"{key}={_value(value)}" for key, value in event.data.items())
    return f"{when}  {event.job}  {event.event}  {data}".rstrip()


def _value(value: object) -> str:
    return value if isinstance(value, str) and value.isalnum() else json.dumps(value, ensure_ascii=False)
