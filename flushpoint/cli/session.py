"""The connection of one command to the API.

The client library is imported when a command needs it: `flushpoint --help` shall not wait for an HTTP stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.model.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from coordinator.model.view import GroupView
    from flushpoint.client import Client


def connect() -> Client:
    """A client of $FLUSHPOINT_API, else of the embedded stack, started if need be."""
    from flushpoint import client

    return client.connect()


def group(client: Client, text: str) -> GroupView | None:
    """The group of this name, if there is one and no job has this id."""
    if not text:
        return None
    try:
        client.job(text)
    except NotFoundError:
        try:
            return client.group(text)
        except NotFoundError:
            return None
    return None


def job_id(client: Client, text: str) -> str:
    """The id that `text` is or begins. NotFoundError if none does, UsageError if several do."""
    if not text:
        raise UsageError("an empty id names no job", "see flushpoint jobs")
    try:
        return client.job(text).id
    except NotFoundError:  # the beginning of an id, for which all jobs are listed
        found = [job.id for job in client.jobs() if job.id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{len(found)} jobs begin with {text}: {', '.join(found[:4])}", "write more of the id")
    raise NotFoundError(f"there is no job {text}", "see flushpoint jobs")
