"""`flushpoint repository …`: a repository as a whole."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from coordinator.model.errors import DamagedError
from coordinator.model.task import RepositoryTask, TaskKind
from flushpoint.cli import output
from flushpoint.cli.points import TaskFailedError, run_task

UriArgument = Annotated[str, typer.Argument(metavar="URI", help="s3://bucket/prefix or repo+file:///dir.")]

app = typer.Typer(
    name="repository", help="Make, look at and tidy a repository of recovery points.", rich_markup_mode=None
)


def register(parent: typer.Typer) -> None:
    parent.add_typer(app)


@app.command()
def init(
    uri: UriArgument,
    level: Annotated[int, typer.Option(min=1, max=22, help="zstd level of what is stored.")] = 1,
    as_json: output.JsonOption = False,
) -> None:
    """Probe a store and make an empty repository in it, encrypted with ?key=env:NAME, key=file:/PATH or key=kms:KEY."""
    result = run_task(RepositoryTask(kind=TaskKind.INIT, repository=uri, level=level))
    for sentence in result["warnings"]:
        output.say(f"warning: {sentence}")
    _tell(result, as_json, f"repository {result['repository']} is made{', encrypted' if result['encrypted'] else ''}")


@app.command()
def scan(uri: UriArgument, as_json: output.JsonOption = False) -> None:
    """List the groups of a repository, and teach the ledger all its points: from the manifests alone."""
    result = run_task(RepositoryTask(kind=TaskKind.SCAN, repository=uri))
    rows = [(name, str(len(epochs)), str(max(epochs, default=""))) for name, epochs in sorted(result["groups"].items())]
    _tell(result, as_json, output.table([("GROUP", "POINTS", "NEWEST"), *rows]))
    for group, damaged in sorted(result["damaged"].items()):
        for message in damaged.values():
            output.say(f"group {group}: {message}")
    if result["damaged"]:
        raise typer.Exit(DamagedError.exit_code)


@app.command()
def check(
    uri: UriArgument,
    data: Annotated[bool, typer.Option("--data", help="Read every pack, too, and compare its digest.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Look at everything that points lead to. Exit code 5: something is damaged, and the next backups store it anew."""
    try:
        result = run_task(RepositoryTask(kind=TaskKind.CHECK, repository=uri, data=data))
    except TaskFailedError as failed:
        if not failed.found:
            raise
        rows = [(" ".join(damage["points"]) or "none", damage["message"]) for damage in failed.found["damage"]]
        _tell(failed.found, as_json, output.table([("POINTS", "DAMAGE"), *rows]))
        output.say(str(failed))
        raise typer.Exit(failed.exit_code) from None
    _tell(
        result,
        as_json,
        f"{result['points']} points, {result['packs']} packs ({output.size_text(result['pack_bytes'])}): sound; "
        f"{result['orphans']} objects ({output.size_text(result['orphan_bytes'])}) that no point leads to",
    )


@app.command()
def compact(uri: UriArgument, as_json: output.JsonOption = False) -> None:
    """Move what is alive out of packs that are mostly dead; the old ones go with the next prunes."""
    result = run_task(RepositoryTask(kind=TaskKind.COMPACT, repository=uri))
    _tell(
        result, as_json, f"{result['moved_packs']} packs moved, {output.size_text(result['freed_bytes'])} to be freed"
    )


@app.command(name="new-data-key")
def new_data_key(uri: UriArgument, as_json: output.JsonOption = False) -> None:
    """Write with a new data key from now on; what is there stays readable."""
    result = run_task(RepositoryTask(kind=TaskKind.NEW_DATA_KEY, repository=uri))
    _tell(result, as_json, f"new data key {result['key']}")


@app.command(name="rewrap-keys")
def rewrap_keys(
    uri: UriArgument,
    new_key: Annotated[str, typer.Option("--new-key", metavar="REFERENCE", help="env:NAME, file:/PATH or kms:KEY.")],
    as_json: output.JsonOption = False,
) -> None:
    """Change the owner's key: the old one, named in the URI, opens nothing afterwards."""
    result = run_task(RepositoryTask(kind=TaskKind.REWRAP_KEYS, repository=uri, new_key=new_key))
    _tell(result, as_json, f"{result['keys']} keys are wrapped anew")


def _tell(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)
