"""Watching a job until there is nothing to wait for, with a progress bar on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from coordinator.model.errors import (
    DamagedError,
    FlushpointError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from coordinator.model.job import State
from coordinator.model.uri import NOWHERE
from coordinator.model.view import JobView
from flushpoint.cli import output

if TYPE_CHECKING:
    from flushpoint.client import Client

REDRAW_S = 0.25
"""Between two looks at a job whose state stays the same, for the bar."""
QUIET_S = 5.0
"""The same where there is no bar; changes of state are answered at once anyway."""
STANDSTILL_S = 5.0
"""A job that stood still this long, with nobody at work on it, is asked after: its workers may all be gone."""
INTERRUPTED = 4

_EXIT_CODES = {
    kind.code: kind.exit_code
    for kind in (UsageError, RefusedError, NotFoundError, UnavailableError, DamagedError, FlushpointError)
}


def follow(client: Client, job_id: str, as_json: bool) -> None:
    """Wait for the job, tell how it ended, and leave with the exit code that says so."""
    job = until_rest(client, job_id, as_json)
    output.say(ending(job))
    if as_json:
        output.write_job(job, as_json)
    raise typer.Exit(exit_code_of(job))


def until_rest(client: Client, job_id: str, as_json: bool) -> JobView:
    """The job, as soon as nothing more happens to it by itself.

    SIGINT ends the waiting, not the job; nor does an API that is lost (UnavailableError). Both say how to watch again.
    """
    again = f"watch it again with: flushpoint job {job_id} --wait"
    try:
        with _progress() as show:
            return _watch(client, job_id, show)
    except KeyboardInterrupt:
        output.say(f"job {job_id} goes on without you; {again}")
        if as_json:
            output.write_job(client.job(job_id), as_json)
        raise typer.Exit(INTERRUPTED) from None
    except UnavailableError as error:
        remedy = f"{error.remedy}; " if error.remedy else ""
        raise UnavailableError(error.message, f"{remedy}job {job_id} is not lost: {again}") from error


def exit_code_of(job: JobView) -> int:
    """0 for a job that did what it was told so far; else what its error, or its cancelling, means."""
    if job.failed or _was_refused(job):
        return _EXIT_CODES.get(job.error_code, 1)
    return 1 if job.cancelled else 0


def ending(job: JobView) -> str:
    """One sentence about a job at rest, with what may be done next."""
    if job.failed:
        return f"job {job.id} failed: {job.error.rstrip('.')}. {_what_is_left(job)}"
    if job.cancelled:
        return f"job {job.id} was cancelled. {_what_is_left(job)}"
    if _was_refused(job):
        return f"job {job.id} is ready, but was not completed: {job.error}"
    if job.state is State.READY:
        return f"job {job.id} is ready; complete it with: flushpoint complete {job.id}"
    if job.state is State.PENDING:
        return f"job {job.id} is pending; finalize it with: flushpoint finalize {job.id}"
    if job.epoch:
        return (
            f"job {job.id} is done: recovery point {job.group}@{job.epoch}, {output.size_text(job.bytes_read)} read, "
            f"{output.size_text(job.bytes_sent)} stored{_because(job)}"
        )
    took_s = job.concluded_at - job.started_at if job.started_at else 0.0
    passes = output.in_passes(job)
    return (
        f"job {job.id} is done: {output.size_text(job.offset)}{passes}{' and' if passes else ' in'} "
        f"{output.duration_text(took_s)}, "
        f"{output.size_text(job.bytes_sent)} sent"
    )


def _because(job: JobView) -> str:
    return f" ({job.compare_reason})" if job.compare_reason else ""


def _what_is_left(job: JobView) -> str:
    """Before source and target were found fit for each other nothing is written, and the name may be anybody's disk."""
    if job.published:
        return f"Recovery point {job.group}@{job.epoch} had been published before"
    if job.epoch:
        return f"No recovery point of group {job.group} was published"
    if job.spec.task is not None:
        return f"Look at {job.spec.task.repository} with: flushpoint repository check"
    if job.spec.target == NOWHERE:
        return f"{job.spec.source} was not found sound"
    return f"{job.spec.target} is no whole copy" if job.disk_size else f"Nothing was copied to {job.spec.target}"


def _was_refused(job: JobView) -> bool:
    """Whether its last complete was refused: the source still changes, and the job goes on."""
    return job.state is State.READY and not job.complete_requested and job.error_code == RefusedError.code


def _watch(client: Client, job_id: str, show: Callable[[JobView], None]) -> JobView:
    told_of_stop = False
    standstill = _Standstill(client)
    for job in client.watch(job_id, every_s=REDRAW_S if sys.stderr.isatty() else QUIET_S):
        show(job)
        if _rests(job):
            return job
        if output.stopped_by_error(job) and not told_of_stop:
            output.say(f"job {job.id} is paused: {job.error}. Go on with: flushpoint resume {job.id}")
        told_of_stop = output.stopped_by_error(job)
        standstill.look(job)
    return job


class _Standstill:
    """Says, once, that nobody is there to move a job that stands still."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._seen: tuple[int, int, int] | None = None
        self._since = 0.0
        self._told = False

    def look(self, job: JobView) -> None:
        seen = (job.version, job.plan_cursor, job.bytes_read)
        paused = job.state in (State.PAUSED, State.STANDBY)
        if seen != self._seen or job.units_leased or paused or self._told:
            self._seen, self._since = seen, time.monotonic()
        elif time.monotonic() - self._since >= STANDSTILL_S:
            self._since = time.monotonic()
            self._ask(job)

    def _ask(self, job: JobView) -> None:
        health = self._client.health()
        if not health.led:
            lacks = "no coordinator leads; start one with: flushpoint coordinator"
        elif not sum(health.workers.values()):
            lacks = "no worker is alive; start one with: flushpoint worker"
        else:
            return
        output.say(f"job {job.id} waits: {lacks}")
        self._told = True


def _rests(job: JobView) -> bool:
    """Whether nothing more happens until somebody says so."""
    if job.state is State.READY:
        return not job.spec.auto_complete and not job.complete_requested
    if job.state is State.PENDING:
        return not job.spec.auto_finalize and not job.finalize_requested
    return job.state is State.CONCLUDED


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
