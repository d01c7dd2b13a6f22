"""The verbs of a job, as in QEMU: pause, resume, set-speed, complete, cancel, finalize, dismiss.

Where ID names a group, pause, resume, cancel, complete and set-speed are about all of its disks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.model.errors import FlushpointError, UnavailableError
from coordinator.model.group import GroupVerb
from coordinator.model.job import State, Verb
from coordinator.model.view import GroupView, JobView
from flushpoint.cli import output, session, waiting
from flushpoint.cli.mirror import parse_rate

if TYPE_CHECKING:
    from flushpoint.client import Client

FOLLOW_S = 2.0
"""A verb is answered when it is noted down; this is how long the command waits for what follows from it. Only complete
is waited for to its end: it may take passes over the whole disk, and be refused after them."""
GROUP_VERBS = frozenset({Verb.PAUSE, Verb.RESUME, Verb.CANCEL})
_PAUSED = frozenset({State.PAUSED, State.STANDBY})
_GOALS: dict[Verb, frozenset[State]] = {
    Verb.PAUSE: _PAUSED | {State.CONCLUDED},
    Verb.RESUME: frozenset(State) - _PAUSED,
    Verb.CANCEL: frozenset({State.CONCLUDED}),
    Verb.FINALIZE: frozenset({State.CONCLUDED}),
}


def register(app: typer.Typer) -> None:
    for command in (pause, resume, complete, cancel, finalize, dismiss):
        app.command()(command)
    app.command("set-speed")(set_speed)


def pause(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Stop copying for a while; the job keeps its place. Of a group: its copies rest, and no point is begun."""
    _act(Verb.PAUSE, job_id, as_json, lambda client, full_id: client.pause(full_id))


def resume(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Go on after a pause or an error; a job, or a group."""
    _act(Verb.RESUME, job_id, as_json, lambda client, full_id: client.resume(full_id))


def set_speed(
    job_id: output.JobArgument,
    rate: Annotated[str, typer.Argument(help="Bytes per second, as in 50M; 0 is unlimited.")],
    as_json: output.JsonOption = False,
) -> None:
    """Limit a job, over all its workers, or a group, over all its disks."""
    speed = parse_rate(rate)
    with session.connect() as client:
        if (group := session.group(client, job_id)) is not None:
            policy = group.spec.policy.model_copy(update={"speed": speed})
            spec = group.spec.model_copy(update={"policy": policy})
            _write_group(client.apply_group(group.name, spec), as_json)
            return
        output.write_job(client.set_speed(session.job_id(client, job_id), speed), as_json)


def complete(
    job_id: output.JobArgument,
    pivot: Annotated[bool, typer.Option("--pivot", help="Let guests go on with the copies.")] = False,
    downtime: Annotated[
        float, typer.Option("--downtime", metavar="SECONDS", help="How long a pivot of a group may stop guests.")
    ] = 5.0,
    as_json: output.JsonOption = False,
) -> None:
    """End a ready job with a clean copy, and wait for it; if that cannot be, the job goes on. Of a group: make a last
    point, or with --pivot move all of its guests to its targets; all of them, or none."""
    with session.connect() as client:
        if session.group(client, job_id) is not None:
            _complete_group(client, job_id, pivot, downtime, as_json)
            return
        job = client.complete(session.job_id(client, job_id), pivot=pivot)
        job = waiting.until_rest(client, job.id, as_json)
    code = waiting.exit_code_of(job)
    if code:
        output.say(waiting.ending(job))
    output.write_job(job, as_json)
    raise typer.Exit(code)


def cancel(
    job_id: output.JobArgument,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Do not drain requests in flight; give a group's pivot up that has moved some machines."
        ),
    ] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Give a job up; its target is no copy. Of a group: give up the point that is being made, or its completion."""
    _act(Verb.CANCEL, job_id, as_json, lambda client, full_id: client.cancel(full_id, force=force), force=force)


def finalize(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Conclude a pending job."""
    _act(Verb.FINALIZE, job_id, as_json, lambda client, full_id: client.finalize(full_id))


def dismiss(job_id: output.JobArgument, as_json: output.JsonOption = False) -> None:
    """Forget a concluded job."""
    with session.connect() as client:
        full_id = session.job_id(client, job_id)
        client.dismiss(full_id)
    if as_json:
        output.write_json({"id": full_id, "dismissed": True})
    else:
        print(f"{full_id}  dismissed")


def _complete_group(client: Client, name: str, pivot: bool, downtime_s: float, as_json: bool) -> None:
    """SIGINT ends the waiting alone."""
    asked = client.ask_to_complete_group(name, pivot=pivot, downtime_s=downtime_s)
    try:
        ended = client.completion(name, asked.id)
    except KeyboardInterrupt:
        output.say(f"it goes on without you; see how it ends with: flushpoint group {name}")
        raise typer.Exit(waiting.INTERRUPTED) from None
    if as_json:
        output.write_json(ended.model_dump(mode="json"))
    if not ended.done:
        raise FlushpointError(f"group {name} was not completed: {ended.why}", "it goes on as before; try again")
    if as_json:
        return
    print(f"{name}@{ended.point}  {'moved to its targets' if ended.pivoted else 'complete'}")
    for vm, downtime_ms in ended.downtimes_ms.items():
        print(f"  {vm} stood still for {downtime_ms:.1f} ms")


def _write_group(group: GroupView, as_json: bool) -> None:
    if as_json:
        output.write_json(group.model_dump(mode="json"))
    else:
        speed = group.spec.policy.speed
        limit = f", at most {output.rate_text(speed)}" if speed else ""
        doing = str(group.round.stage) if group.round else "at rest"
        print(f"{group.name}  {'paused' if group.paused else doing}{limit}")


def _act(verb: Verb, text: str, as_json: bool, send: Callable[[Client, str], JobView], *, force: bool = False) -> None:
    """Send a verb, and show the state that it leads to, or that is there after a while."""
    goals = _GOALS[verb]
    with session.connect() as client:
        if verb in GROUP_VERBS and session.group(client, text) is not None:
            _write_group(client.act_on_group(text, GroupVerb(verb), force=force), as_json)
            return
        job = send(client, session.job_id(client, text))
        if job.state not in goals:
            try:
                job = client.wait(job.id, until=goals, timeout_s=FOLLOW_S)
            except UnavailableError:
                job = client.job(job.id)
    output.write_job(job, as_json, "" if job.state in goals else f"{verb} asked for")
