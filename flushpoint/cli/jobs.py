"""`flushpoint jobs` and `flushpoint job`: look at what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from flushpoint.cli import output, session, waiting


def register(app: typer.Typer) -> None:
    app.command()(jobs)
    app.command()(job)


def jobs(as_json: output.JsonOption = False) -> None:
    """List all jobs, newest first."""
    with session.connect() as client:
        found = list(client.jobs())
    with output.cut_off_quietly():
        if as_json:
            output.write_json({"jobs": [one.model_dump(mode="json") for one in found]})
        else:
            print(output.job_table(found))


def job(
    job_id: output.JobArgument,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until it is done, as mirror does.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Show one job."""
    with session.connect() as client:
        full_id = session.job_id(client, job_id)
        if wait:
            waiting.follow(client, full_id, as_json)
        found = client.job(full_id)
    if as_json:
        output.write_job(found, as_json)
    else:
        print(output.job_details(found))
