"""Consistency groups: apply their files, look at them, ask for recovery points."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from coordinator.model.errors import FlushpointError, NotFoundError, UnavailableError, UsageError
from coordinator.model.group import GroupFile, GroupSpec
from coordinator.model.mirror import MirrorState
from coordinator.model.view import CheckpointState, CheckpointView, GroupView
from flushpoint.cli import output, session, waiting

if TYPE_CHECKING:
    from flushpoint.client import Client

_TIME_OF_DAY = re.compile(r"\d+:\d\d$")
GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="Name of a consistency group.")]


def register(app: typer.Typer) -> None:
    for command in (apply, groups, group, checkpoint, delete):
        app.command()(command)


def apply(
    file: Annotated[
        str, typer.Option("--file", "-f", metavar="FILE", help="Of groups, in YAML or JSON; - is stdin.")
    ] = "",
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of such files, and do nothing else.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Make the groups of a file, or change them to what it says; what is so already is left alone."""
    if schema:
        print(json.dumps(GroupFile.schema_of_file(), indent=2))
        return
    if not file:
        raise UsageError("no file was named", "give one with -f")
    wanted = list(_read(file))
    told: list[tuple[str, dict[str, list[Any]] | None]] = []
    with session.connect() as client:
        for one in wanted:
            name = one.metadata.name
            changes = _changes(known(client, name), one.spec)
            if not dry_run and changes != {}:
                client.apply_group(name, one.spec)
            told.append((name, changes))
    if as_json:
        entries = [{"group": name, "changes": changes} for name, changes in told]
        output.write_json({"dry_run": dry_run, "groups": entries})
        return
    for name, changes in told:
        print(_told(name, changes, dry_run))


def groups(as_json: output.JsonOption = False) -> None:
    """List all groups."""
    with session.connect() as client:
        found = client.groups()
    if as_json:
        output.write_json(found.model_dump(mode="json"))
        return
    print(_table(found.groups))
    for name, why in found.unreadable.items():
        output.say(f"the record of group {name} cannot be read: {why}; flushpoint delete {name} removes it")


def group(name: GroupArgument, as_json: output.JsonOption = False) -> None:
    """Show one group, and how its last rounds ended."""
    with session.connect() as client:
        found = client.group(name)
    if as_json:
        output.write_json(found.model_dump(mode="json"))
        return
    print(_table([found]))
    if found.completing is not None:
        print(f"  completing, {found.completing.passes} passes so far, {found.completing.failures} failures")
    for disk, state in found.mirrors.items():
        print(f"  {disk} at {state.target}: {_held(name, state)}")
    for disk, (done, size) in found.seeding.items():
        print(f"  seeding {disk}: {output.size_text(done)} of {output.size_text(size)}")
    for member in found.spec.members:
        where = member.qmp or ", ".join(member.images.values())
        print(f"  {member.vm} on {member.host} ({where}): {', '.join(member.disks)}")
    rows = [
        (
            f"{name}@{outcome.number}" if outcome.number else "-",
            "published" if outcome.published else "copied a part" if outcome.is_step else "failed",
            output.duration_text(outcome.ended_at - outcome.begun_at),
            outcome.why,
        )
        for outcome in found.outcomes
    ]
    if rows:
        print(output.table([("POINT", "OUTCOME", "TOOK", "WHY"), *rows]))


def checkpoint(
    name: GroupArgument,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print the request's id and do not wait.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Make a recovery point of all disks of a group, cut at one moment after this, and wait for it."""
    with session.connect() as client:
        make_point(client, name, detach=detach, as_json=as_json)


def make_point(client: Client, name: str, *, detach: bool, as_json: bool) -> None:
    """Ask for one, and print what becomes of it; or, to `detach`, the request's id."""
    asked = client.ask_for_checkpoint(name)
    if detach:
        output.write_json(asked.model_dump(mode="json")) if as_json else print(asked.id)
        return
    done = _awaited(client, asked)
    if as_json:
        output.write_json(done.model_dump(mode="json"))
    if done.state is not CheckpointState.PUBLISHED:
        raise FlushpointError(
            f"no recovery point of group {name} was published: {done.why}",
            f"the one before is as it was; see flushpoint group {name}",
        )
    if not as_json:
        print(f"{name}@{done.point}")


def delete(name: GroupArgument, as_json: output.JsonOption = False) -> None:
    """Forget a group. Its recovery points stay where they are. Complete it before, and its guests have nothing of it
    left."""
    with session.connect() as client:
        client.remove_group(name)
    if as_json:
        output.write_json({"group": name, "deleted": True})
    else:
        print(f"{name}  deleted")


def repository_of(name: str, given: str) -> str:
    """`given` if it is, else where the group of this name keeps its points. UsageError without either."""
    if given:
        return given
    with session.connect() as client:
        found = known(client, name)
    if found is None:
        raise UsageError(
            f"{name} is no group that the coordinator knows", "name the repository of its points with --repository"
        )
    return found.spec.repository


def _awaited(client: Client, asked: CheckpointView) -> CheckpointView:
    """SIGINT ends the waiting, not the checkpoint; nor does an API that is lost."""
    again = f"see how it ends with: flushpoint group {asked.group}"
    try:
        return client.checkpoint(asked.group, asked.id)
    except KeyboardInterrupt:
        output.say(f"the checkpoint goes on without you; {again}")
        raise typer.Exit(waiting.INTERRUPTED) from None
    except UnavailableError as error:
        remedy = f"{error.remedy}; " if error.remedy else ""
        raise UnavailableError(error.message, f"{remedy}the checkpoint is not lost: {again}") from error


def _read(file: str) -> Iterator[GroupFile]:
    import yaml  # costs a tenth of what --help takes

    class Loader(yaml.SafeLoader):
        """22:00 is text, as in YAML 1.2 and to editors; PyYAML would make it 1320, as YAML 1.1 does."""

    Loader.yaml_implicit_resolvers = {
        first: [("tag:yaml.org,2002:str", _TIME_OF_DAY), *resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}", "name a file of groups") from error
    try:
        documents = [document for document in yaml.load_all(text, Loader) if document is not None]
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is no YAML: {' '.join(str(error).split())}", "correct it") from error
    if not documents:
        raise UsageError(f"{file} holds no group", "see config/group.yaml for one")
    for number, document in enumerate(documents, 1):
        try:
            yield GroupFile.model_validate(document)
        except ValidationError as error:
            where = f"{file}, document {number}" if len(documents) > 1 else file
            remedy = "flushpoint apply --schema tells what a file may say"
            raise UsageError(f"{where}: {_wrong(error)}", remedy) from None


def _wrong(error: ValidationError) -> str:
    """Everything at once: who corrects a file wants to do so once."""
    texts = []
    for one in error.errors():
        place = ".".join(str(part) for part in one["loc"])
        reason = one["msg"].removeprefix("Value error, ")
        texts.append(f"{place}: {reason}" if place else reason)
    return "; ".join(texts)


def known(client: Client, name: str) -> GroupView | None:
    """The group of this name, if there is one."""
    try:
        return client.group(name)
    except NotFoundError:
        return None


def _changes(known: GroupView | None, spec: GroupSpec) -> dict[str, list[Any]] | None:
    """By the place in the file, what was there and what will be; None for a group that is new."""
    if known is None:
        return None
    old, new = (dict(_leaves("", one.model_dump(mode="json"))) for one in (known.spec, spec))
    return {place: [old.get(place), new.get(place)] for place in sorted(old | new) if old.get(place) != new.get(place)}


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Members are told by the names of their machines, whatever their order."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{place}.{key}" if place else str(key), part)
    elif place == "members":
        for member in value:
            yield from _leaves(f"members[{member['vm']}]", {k: v for k, v in member.items() if k != "vm"})
    else:
        yield place, value


def _held(name: str, state: MirrorState) -> str:
    if state.is_consistent:
        return f"{name}@{state.epoch}"
    return f"INCONSISTENT, some of {name}@{state.begun} over {f'{name}@{state.epoch}' if state.epoch else 'nothing'}"


def _told(name: str, changes: Mapping[str, list[Any]] | None, dry_run: bool) -> str:
    if changes is None:
        return f"{name}  {'would be made' if dry_run else 'made'}"
    if not changes:
        return f"{name}  unchanged"
    what = "; ".join(f"{place}: {json.dumps(old)} -> {json.dumps(new)}" for place, (old, new) in changes.items())
    return f"{name}  {'would change' if dry_run else 'changed'}: {what}"


def _table(found: list[GroupView]) -> str:
    head = ("GROUP", "POINT", "AGE", "RPO", "DOES", "MACHINES", "DISKS", "REPOSITORY")
    rows = [
        (
            one.name,
            str(one.point) if one.point else "-",
            output.duration_text(one.rpo_s) if one.rpo_s is not None else "-",
            _objective(one),
            _doing(one),
            str(len(one.spec.members)),
            str(len(one.spec.disks)),
            one.spec.repository,
        )
        for one in found
    ]
    return output.table([head, *rows])


def _objective(group: GroupView) -> str:
    rpo_s = group.spec.policy.rpo
    return f"{output.duration_text(rpo_s)}{', missed' if group.rpo_missed else ''}" if rpo_s else "-"


def _doing(group: GroupView) -> str:
    parts = ([str(group.round.stage)] if group.round else []) + (["paused"] if group.paused else [])
    parts += ["completing"] if group.completing else ["complete"] if group.completed else []
    return ", ".join(parts) or "-"
