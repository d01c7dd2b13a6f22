"""The commands that run parts: up and down for the embedded stack, the others for everything else."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from flushpoint import embedded
from flushpoint.cli import output


def register(app: typer.Typer) -> None:
    for command in (up, down, coordinator, worker, agent, guard):
        app.command()(command)


def up(
    slots: Annotated[int | None, typer.Option(min=1, max=256, help="Work units copied at a time.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Run the embedded stack in the foreground; other commands start it for themselves."""
    from flushpoint import supervisor

    state = embedded.state_dir()
    environ = dict(os.environ) if slots is None else {**os.environ, "FLUSHPOINT_WORKER_SLOTS": str(slots)}

    def announce() -> None:
        if as_json:
            output.write_json({"api": state.address, "pid": os.getpid()})
        elif sys.stderr.isatty():
            output.say(f"the API will be at {state.address}; Ctrl-C stops it")

    raise typer.Exit(supervisor.run(state, environ, announce))


def down(as_json: output.JsonOption = False) -> None:
    """Stop the embedded stack; its jobs go on when it runs again."""
    was_running = embedded.stop()
    if as_json:
        output.write_json({"was_running": was_running})
    else:
        output.say("the embedded stack is stopped" if was_running else "the embedded stack does not run")


def coordinator(as_json: output.JsonOption = False) -> None:
    """Run a coordinator: control loop and API. Settings: FLUSHPOINT_* in the environment."""
    _become("coordinator", dict(os.environ), as_json)


def worker(
    slots: Annotated[int | None, typer.Option(min=1, max=256, help="Work units copied at a time.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Run a worker. Settings: FLUSHPOINT_* in the environment."""
    environ = dict(os.environ) if slots is None else {**os.environ, "FLUSHPOINT_WORKER_SLOTS": str(slots)}
    _become("workers", environ, as_json)


def agent(
    host: Annotated[str, typer.Option(help="How this host is called in groups; by default its own name.")] = "",
    as_json: output.JsonOption = False,
) -> None:
    """Run a host's agent, which alone speaks to its guests. Settings: FLUSHPOINT_* in the environment."""
    _become("workers.agent", {**os.environ, "FLUSHPOINT_AGENT_HOST": host} if host else dict(os.environ), as_json)


def guard(as_json: output.JsonOption = False) -> None:
    """Run a host's guard, apart from its agent: it lets guests run again when the agent does not. FLUSHPOINT_*."""
    _become("workers.agent.guard", dict(os.environ), as_json)


def _become(module: str, environ: dict[str, str], as_json: bool) -> NoReturn:
    """Replace this process: signals then reach the part itself, under its own process id."""
    if as_json:
        output.write_json({"pid": os.getpid()})
    # -P: the current directory must not shadow our modules.
    os.execve(sys.executable, [sys.executable, "-P", "-m", module], environ)
