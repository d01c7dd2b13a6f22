"""What the ledger remembers of recovery points, in memory: the twin of redis_points.py."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.ledger.contract import NewEvent
from coordinator.ledger.redis_points import FORGOTTEN, published_data
from coordinator.model.events import EventName
from coordinator.model.point import PointRecord, RepositoryRecord


@dataclass(frozen=True, slots=True)
class _Remembered:
    point: PointRecord
    mark: int


class MemoryPoints:
    def __init__(
        self,
        lock: threading.Condition,
        clock: Callable[[], float],
        emit: Callable[[str, Sequence[NewEvent]], None],
    ) -> None:
        self._lock = lock
        self._seconds = clock
        self._tell = emit
        self._repositories: dict[str, RepositoryRecord] = {}
        self._points: dict[str, dict[tuple[str, int], _Remembered]] = {}
        self._told: set[tuple[str, str, int]] = set()
        self._forgotten: dict[tuple[str, str, int], int] = {}
        self._mark = 0

    def points_mark(self) -> int:
        with self._lock:
            self._mark = max(int(self._seconds() * 1_000_000), self._mark + 1)
            return self._mark

    def record_points(
        self, repository: str, uri: str, points: Sequence[PointRecord], mark: int, *, publish: bool = False
    ) -> int:
        with self._lock:
            before = self._repositories.get(repository)
            at = before.scanned_at if before else 0.0
            self._repositories[repository] = RepositoryRecord(id=repository, uri=uri, scanned_at=at)
            remembered = self._points.setdefault(repository, {})
            new = 0
            for point in points:
                place = (point.group, point.epoch)
                name = (repository, *place)
                if self._forgotten.get(name, 0) > mark:
                    continue
                old = remembered.get(place)
                remembered[place] = _Remembered(old.point if old else point, self.points_mark())
                new += old is None
                if publish and name not in self._told:
                    self._told.add(name)
                    data = published_data(repository, point)
                    self._tell(point.job, [NewEvent(EventName.RECOVERY_POINT, data)])
            return new

    def retain_points(self, repository: str, group: str, epochs: Sequence[int], mark: int) -> int:
        with self._lock:
            remembered = self._points.get(repository, {})
            gone = [
                place
                for place, known in remembered.items()
                if place[0] == group and place[1] not in epochs and known.mark <= mark
            ]
            for place in gone:
                self._forget(repository, place)
            return len(gone)

    def forget_points(self, repository: str, group: str, epochs: Sequence[int]) -> None:
        with self._lock:
            for epoch in epochs:
                self._forget(repository, (group, epoch))

    def _forget(self, repository: str, place: tuple[str, int]) -> None:
        self._points.get(repository, {}).pop(place, None)
        name = (repository, *place)
        self._told.discard(name)
        self._forgotten.pop(name, None)
        self._forgotten[name] = self.points_mark()
        of_it = [one for one in self._forgotten if one[0] == repository]
        for one in of_it[:-FORGOTTEN]:
            del self._forgotten[one]

    def scanned(self, repository: str, uri: str) -> None:
        with self._lock:
            self._repositories[repository] = RepositoryRecord(id=repository, uri=uri, scanned_at=self._seconds())

    def repositories(self) -> list[RepositoryRecord]:
        with self._lock:
            return sorted(self._repositories.values(), key=lambda record: record.id)

    def point_groups(self, repository: str) -> dict[str, int]:
        with self._lock:
            return dict(Counter(group for group, _ in self._points.get(repository, {})))

    def point_epochs(self, repository: str, group: str) -> list[int]:
        with self._lock:
            return sorted(epoch for name, epoch in self._points.get(repository, {}) if name == group)

    def points(self, repository: str, group: str, *, after: int = 0, limit: int = 100) -> list[PointRecord]:
        with self._lock:
            epochs = [epoch for epoch in self.point_epochs(repository, group) if epoch > after][:limit]
            return [self._points[repository][group, epoch].point for epoch in epochs]
