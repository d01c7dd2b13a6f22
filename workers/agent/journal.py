"""Which guests of a host stand still because of us, on disk: for the case that agent and guard are both killed.

A file for each, written before the guest is stopped and removed when it runs again; and one for each whose file systems
are frozen, for these may be so while it runs. An agent that starts lets run what it finds here, and has it thawed,
before it does anything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from coordinator.model.errors import UnavailableError

_ENDING = ".frozen"


@dataclass(frozen=True, slots=True)
class Journal:
    """`directory` is on a disk of the host's own, and the agent's alone. A guest is known by its monitor's socket."""

    directory: Path

    @property
    def files(self) -> Journal:
        """Of guests whose file systems are frozen, known by the sockets of their own agents."""
        return Journal(self.directory / "files")

    def write(self, guest: Path, process: str = "") -> None:
        """Durable when it returns; `process` is that of its QEMU, "" of one that is not known. UnavailableError: then
        the guest is not touched."""
        path = self._path(guest)
        with self._told("written"):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_suffix(".new")
            with temporary.open("w") as file:
                json.dump({"socket": str(guest), "process": process}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._sync()

    def erase(self, guest: Path) -> None:
        """Not durable at once: an entry too many lets a guest run that does already."""
        with self._told("erased"):
            self._path(guest).unlink(missing_ok=True)

    def frozen(self) -> Iterator[Path]:
        """Those that were stopped, or frozen, and as far as is known not let run."""
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.glob(f"*{_ENDING}")):
            try:
                yield Path(str(json.loads(path.read_text())["socket"]))
            except FileNotFoundError:  # just erased
                continue
            except (ValueError, KeyError):
                path.unlink(missing_ok=True)  # cut off by a crash before it was renamed: nothing was stopped yet

    def has(self, guest: Path) -> bool:
        return self._path(guest).exists()

    def is_of(self, guest: Path, process: str) -> bool:
        """Whether it was this one that was stopped, as far as is known, and not one before it."""
        try:
            known = str(json.loads(self._path(guest).read_text()).get("process", ""))
        except (OSError, ValueError):
            return False
        return not known or not process or known == process

    def _path(self, guest: Path) -> Path:
        return self.directory / f"{sha256(str(guest).encode()).hexdigest()[:32]}{_ENDING}"

    def _sync(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnavailableError(
                f"the journal of stopped guests in {self.directory} cannot be {what}: {error.strerror}",
                "make room there, or name another directory",
            ) from error
