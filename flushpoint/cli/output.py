"""How things are written: data to standard output, messages to standard error, one line each."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer

from coordinator.model.errors import FlushpointError
from coordinator.model.job import IoStatus, State, Sync
from coordinator.model.view import JobView

JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of a job, or an unambiguous beginning of it.")]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def say(message: str) -> None:
    """A message for a person."""
    print(f"flushpoint: {message}", file=sys.stderr, flush=True)


def write_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False), flush=True)


def write_job(job: JobView, as_json: bool, remark: str = "") -> None:
    """The job as a program or a person wants to see it; `remark` is for the person."""
    if as_json:
        write_json(job.model_dump(mode="json"))
    else:
        print(f"{job.id}  {job.state}{remark and f' ({remark})'}", flush=True)


@contextlib.contextmanager
def cut_off_quietly() -> Iterator[None]:
    """Around what lists: a reader that has had enough, such as `head`, is no failure."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would fail once more, and be told of, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: FlushpointError, as_json: bool) -> int:
    """Say what went wrong; the exit code. With --json the problem is the command's document too."""
    say(str(error))
    if as_json:
        problem = {
            "code": error.code,
            "detail": error.message,
            "remedy": error.remedy,
            "exit_code": error.exit_code,
        }
        write_json({"error": problem})
    return error.exit_code


def size_text(count: float) -> str:
    """1536 is '1.5 KiB'."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def rate_text(bytes_per_s: float) -> str:
    return f"{size_text(bytes_per_s)}/s"


def duration_text(seconds: float) -> str:
    """3725 is '1:02:05'; below a minute '12.3 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def outcome_text(job: JobView) -> str:
    """State, and for a concluded job how it ended."""
    if job.failed:
        return "failed"
    if job.cancelled:
        return "cancelled"
    return "done" if job.state is State.CONCLUDED else str(job.state)


def stopped_by_error(job: JobView) -> bool:
    """Paused by an error policy, not by a person."""
    is_paused = job.state in (State.PAUSED, State.STANDBY)
    return is_paused and (job.io_status is not IoStatus.OK or job.target_io_status is not IoStatus.OK)


def expected_len(job: JobView) -> int:
    """Bytes that the job will have to copy; an estimate while the disk is still being planned."""
    if job.plan_done or not job.plan_cursor:
        return job.len
    return round(job.len * job.disk_size / job.plan_cursor)


def progress_text(job: JobView) -> str:
    total = expected_len(job)
    if not total:
        return "100%" if outcome_text(job) == "done" else "-"
    return f"{100 * job.offset // total}%"


def in_passes(job: JobView) -> str:
    """The sum of several passes can be more than the disk holds, so their number is told; "" for one."""
    return f" in {job.pass_number} passes" if job.pass_number > 1 else ""


def job_table(jobs: Iterable[JobView]) -> str:
    head = ("ID", "STATE", "DONE", "RATE", "SOURCE", "TARGET")
    rows = [
        (
            job.id,
            outcome_text(job),
            progress_text(job),
            rate_text(job.rate),
            job.spec.task.kind if job.spec.task else job.spec.source,
            job.spec.task.repository if job.spec.task else job.spec.target,
        )
        for job in jobs
    ]
    return table([head, *rows])


def job_details(job: JobView) -> str:
    """Everything about one job that a person asks for, a field a line."""
    rows = [
        ("id", job.id),
        ("state", outcome_text(job) if job.state is State.CONCLUDED else str(job.state)),
        ("source", job.spec.source),
        ("point", str(job.source_point) if job.source_point else ""),
        ("target", job.spec.target),
        ("sync", job.spec.sync),
        ("bitmap", job.bitmap or (job.spec.bitmap if job.spec.sync is Sync.DIRTY else "") or ""),
        ("created", _time_text(job.created_at)),
        ("started", _time_text(job.started_at)),
        ("concluded", _time_text(job.concluded_at)),
        ("disk", size_text(job.disk_size) if job.disk_size else ""),
        ("pass", f"{job.pass_number} ({job.pass_kind})" if job.pass_number else ""),
        (
            "progress",
            f"{size_text(job.offset)} of {size_text(expected_len(job))} ({progress_text(job)}){in_passes(job)}",
        ),
        ("read, sent", f"{size_text(job.bytes_read)}, {size_text(job.bytes_sent)}"),
        ("rate", rate_text(job.rate)),
        ("remaining", duration_text(job.eta_s) if job.eta_s else ""),
        ("speed limit", rate_text(job.speed) if job.speed else "none"),
        ("units", f"{job.units_done} done, {job.units_leased} under way, {job.units_ready} ready"),
        ("quarantined", f"{job.units_quarantined} units" if job.units_quarantined else ""),
        ("I/O status", f"{job.io_status}, target {job.target_io_status}"),
        ("compared", job.compare_reason),
        ("error", job.error),
    ]
    return table([(f"{name}:", value) for name, value in rows if value])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, left-aligned, two spaces apart; the last one is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[-1] = 0
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def _time_text(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s)) if unix_s else ""
