"""Watching a job until there is nothing to wait for, with a progress bar on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from coordinator.model.errors import (
    FlushpointError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from coordinator.model.job import State
from coordinator.model.view import JobView
from flushpoint.cli import output

if TYPE_CHECKING:
    from flushpoint.client import Client

REDRAW_S = 0.25
"""Between two looks at a job whose state stays the same, for the bar."""
QUIET_S = 30.0
"""The same where nobody looks; changes of state are answered at once anyway."""
INTERRUPTED = 4

_EXIT_CODES = {
    kind.code: kind.exit_code for kind in (UsageError, RefusedError, NotFoundError, UnavailableError, FlushpointError)
}


def follow(client: Client, job_id: str, as_json: bool) -> None:
    """Wait for the job, tell how it ended, and leave with the exit code that says so.

    SIGINT ends the waiting, not the job.
    """
    job: JobView | None = None
    try:
        with _progress() as show:
            job = _watch(client, job_id, show)
    except KeyboardInterrupt:
        output.say(f"job {job_id} goes on without you; watch it again with: flushpoint job {job_id} --wait")
        if as_json:
            output.write_job(client.job(job_id), as_json)
        raise typer.Exit(INTERRUPTED) from None
    output.say(_ending(job))
    if as_json:
        output.write_job(job, as_json)
    raise typer.Exit(exit_code_of(job))


def exit_code_of(job: JobView) -> int:
    """0 for a job that did what it was told so far; else what its error, or its cancelling, means."""
    if job.failed:
        return _EXIT_CODES.get(job.error_code, 1)
    return 1 if job.cancelled else 0


def _watch(client: Client, job_id: str, show: Callable[[JobView], None]) -> JobView:
    told_of_stop = False
    for job in client.watch(job_id, every_s=REDRAW_S if sys.stderr.isatty() else QUIET_S):
        show(job)
        if _rests(job):
            return job
        if output.stopped_by_error(job) and not told_of_stop:
            output.say(f"job {job.id} is paused: {job.error}. Go on with: flushpoint resume {job.id}")
        told_of_stop = output.stopped_by_error(job)
    return job


def _rests(job: JobView) -> bool:
    """Whether nothing more happens until somebody says so."""
    if job.state is State.READY:
        return not job.spec.auto_complete and not job.complete_requested
    if job.state is State.PENDING:
        return not job.spec.auto_finalize and not job.finalize_requested
    return job.state is State.CONCLUDED


def _ending(job: JobView) -> str:
    if job.failed:
        return f"job {job.id} failed: {job.error.rstrip('.')}. {job.spec.target} is no whole copy"
    if job.cancelled:
        return f"job {job.id} was cancelled. {job.spec.target} is no whole copy"
    if job.state is State.READY:
        refusal = f": {job.error}" if job.error else ""
        return f"job {job.id} is ready{refusal}; complete it with: flushpoint complete {job.id}"
    if job.state is State.PENDING:
        return f"job {job.id} is pending; finalize it with: flushpoint finalize {job.id}"
    took_s = job.concluded_at - job.started_at if job.started_at else 0.0
    passes = output.in_passes(job)
    return (
        f"job {job.id} is done: {output.size_text(job.offset)}{passes}{' and' if passes else ' in'} "
        f"{output.duration_text(took_s)}, "
        f"{output.size_text(job.bytes_sent)} sent"
    )


@contextmanager
def _progress() -> Iterator[Callable[[JobView], None]]:
    """Shows a job as it goes, on a terminal; elsewhere nothing.

    Nothing either where $NO_COLOR asks for no escape codes: a bar is drawn with them, coloured or not.
    """
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        yield lambda job: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[remaining]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None, rate="", remaining="")

        def show(job: JobView) -> None:
            progress.update(
                task,
                description=f"{job.id[:8]} {job.state}",
                total=output.expected_len(job) or None,
                completed=job.offset,
                rate=output.rate_text(job.rate),
                remaining="" if job.eta_s is None else f"{output.duration_text(job.eta_s)} left",
            )

        yield show
