"""What the ledger remembers of recovery points, in Redis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice

from coordinator.ledger.connection import Server
from coordinator.model.point import PointRecord, RepositoryRecord

POINTS_AT_ONCE = 100
"""Recorded by one script, so that points of many disks hold up nobody else for long."""
FORGOTTEN = 10_000
"""Points of which it is remembered that they were forgotten; also in prelude.lua."""


class RedisPoints:
    _server: Server

    def record_points(
        self, repository: str, uri: str, points: Sequence[PointRecord], mark: int, *, publish: bool = False
    ) -> int:
        new, left = 0, iter(points)
        batch = list(islice(left, POINTS_AT_ONCE))
        while True:
            words: list[str | int] = []
            for point in batch:
                event = json.dumps(published_data(repository, point)) if publish else ""
                words += [point.group, point.epoch, point.model_dump_json(), point.job, event]
            new += int(self._server.ask("record_points", repository, uri, mark, *words))
            batch = list(islice(left, POINTS_AT_ONCE))
            if not batch:
                return new

    def points_mark(self) -> int:
        return int(self._server.ask("points_mark"))

    def retain_points(self, repository: str, group: str, epochs: Sequence[int], mark: int) -> int:
        return int(self._server.ask("retain_points", repository, group, mark, *epochs))

    def forget_points(self, repository: str, group: str, epochs: Sequence[int]) -> None:
        self._server.ask("forget_points", repository, group, *epochs)

    def scanned(self, repository: str, uri: str) -> None:
        self._server.ask("scanned", repository, uri)

    def repositories(self) -> list[RepositoryRecord]:
        flat = iter(self._server.ask("repositories"))
        found = []
        for repository, facts in zip(flat, flat, strict=True):
            at, _, uri = facts.partition(" ")
            found.append(RepositoryRecord(id=repository, uri=uri, scanned_at=float(at)))
        return sorted(found, key=lambda record: record.id)

    def point_groups(self, repository: str) -> dict[str, int]:
        return {group: int(count) for group, count in self._server.ask("point_groups", repository)}

    def point_epochs(self, repository: str, group: str) -> list[int]:
        return [int(epoch) for epoch in self._server.ask("point_epochs", repository, group)]

    def points(self, repository: str, group: str, *, after: int = 0, limit: int = 100) -> list[PointRecord]:
        answer = self._server.ask("points", repository, group, after, limit)
        return [PointRecord.model_validate_json(text) for text in answer]


def published_data(repository: str, point: PointRecord) -> dict[str, object]:
    """The data of a RECOVERY_POINT event."""
    return {"repository": repository, "group": point.group, "epoch": point.epoch, "cut_at": point.cut_at}
