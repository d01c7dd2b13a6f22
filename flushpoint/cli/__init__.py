"""The command `flushpoint`: a module a family of commands.

Data goes to standard output, everything else to standard error. Exit codes: 0 done, 1 the job failed or was
cancelled, 2 usage, 3 refused or not found, 4 interrupted and resumable, or unavailable, 5 damage was found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from coordinator.model.errors import FlushpointError, UsageError
from flushpoint.cli import bitmaps, doctor, events, groups, jobs, mirror, output, points, repository, stack, verbs

INTERRUPTED = 4
_TYPER_INTERRUPTED = 130

app = typer.Typer(
    name="flushpoint",
    help="Mirror disks and keep their recovery points, with a fleet of workers.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in boxes costs 60 ms, and is cut off when piped
    context_settings={"help_option_names": ["-h", "--help"]},
)
for family in (mirror, jobs, verbs, events, groups, points, repository, bitmaps, stack, doctor):
    family.register(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. No error of ours is shown as a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    # Looked for in the words, since words that cannot be parsed are an error to report too.
    as_json = "--json" in arguments
    try:
        result = app(arguments, prog_name="flushpoint", standalone_mode=False)
    except FlushpointError as error:
        return output.report(error, as_json)
    except typer.TyperException as error:
        return output.report(_usage_error(error), as_json)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    if result == _TYPER_INTERRUPTED:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version and exit.",
            is_eager=True,
            callback=lambda value: _version(value),
        ),
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # a tenth of the time that --help takes

        print(version("flushpoint"))
        raise typer.Exit


def _usage_error(error: typer.TyperException) -> UsageError:
    text = error.format_message().replace("\n", " ").rstrip(". ")
    return UsageError(text[:1].lower() + text[1:], "see flushpoint --help")
