"""Objects as files of a directory, on a local or network file system.

========================  ========================================================================
``DIR/packs/3f…``          an object
``DIR/.tmp/<random>``      one being written; never listed, removed when old (`abort_uploads`)
========================  ========================================================================

An object is written to `.tmp`, synced, and then given its name: by rename, or by link where it must not replace
another. Both are atomic, and the directory is synced before a call returns. A failed fsync is never repeated: the
kernel may have dropped the pages, and a second one would succeed without them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError
from workers.repository.store.contract import (
    Buffer,
    MissingObjectError,
    ObjectInfo,
    ReadNext,
    ShortObjectError,
    StoreError,
    check_key,
    check_prefix,
)

TEMPORARY = ".tmp"
"""No key begins with a dot, so no object can be there."""
_FILE_MODE, _DIRECTORY_MODE = 0o600, 0o700  # what is on the disks of guests is nobody else's business
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a FIFO must not wait for its other end
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """An ObjectStore in `directory`, which has to be there: an absent one may be a file system not mounted."""

    def __init__(self, directory: str) -> None:
        self._root = Path(directory)
        self._durable = {self._root}
        if not self._root.is_dir():
            raise self._no_root()

    @property
    def name(self) -> str:
        return f"repo+file://{self._root}"

    def get(self, key: str) -> bytes:
        with self._opened(key) as fd:
            return _read(fd, 0, os.fstat(fd).st_size)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        with self._opened(key) as fd:
            return self._read_exactly(fd, key, offset, length)

    def stream_range(self, key: str, offset: int, length: int, consume: Callable[[ReadNext], None]) -> None:
        position = offset

        with self._opened(key) as fd:

            def read_next(count: int) -> bytes:
                nonlocal position
                data = self._read_exactly(fd, key, position, count)
                position += count
                return data

            consume(read_next)

    def size(self, key: str) -> int | None:
        try:
            with self._opened(key) as fd:
                return os.fstat(fd).st_size
        except MissingObjectError:
            return None

    def put(self, key: str, data: Buffer) -> None:
        with self.upload(key) as upload:
            upload.write(data)
            upload.commit()

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        with self.upload(key) as upload:
            upload.write(data)
            return upload.commit_if_absent()

    def upload(self, key: str) -> LocalUpload:
        target = self._path(key)
        try:
            self._make_directories(target.parent)
            self._make_directories(self._root / TEMPORARY)
            path = self._root / TEMPORARY / secrets.token_hex(16)
            return LocalUpload(self, key, target, path, os.open(path, _CREATE, _FILE_MODE))
        except OSError as error:
            raise self.failed("write", key, error) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        if not self._root.is_dir():
            raise self._no_root()
        yield from self._walk(prefix.rpartition("/")[0], prefix)

    def delete(self, keys: Iterable[str]) -> None:
        parents = set()
        for key in keys:
            path = self._path(key)
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self.failed("delete", key, error) from error
            parents.add(path.parent)
        for parent in parents:
            try:
                _sync_directory(parent)
            except OSError as error:
                raise self.failed("delete", str(parent), error) from error

    def abort_uploads(self, older_than_s: float) -> int:
        oldest_s = time.time() - older_than_s
        aborted = 0
        try:
            for entry in _entries(self._root / TEMPORARY):
                with contextlib.suppress(FileNotFoundError):  # that upload has ended meanwhile
                    if entry.stat(follow_symlinks=False).st_mtime <= oldest_s:
                        Path(entry.path).unlink()
                        aborted += 1
        except OSError as error:
            raise self.failed("tidy", TEMPORARY, error) from error
        return aborted

    @property
    def locks(self) -> bool:
        return False

    def extend_lock(self, key: str) -> None:
        check_key(key)

    def close(self) -> None: ...

    def failed(self, verb: str, key: str, error: OSError) -> FlushpointError:
        """What to tell of a failed system call on the object `key`."""
        what = f"cannot {verb} {key} in {self.name}: {os.strerror(error.errno or errno.EIO)}"
        match error.errno:
            case errno.ENOENT if not self._root.is_dir():
                return self._no_root()
            case errno.ENOENT if verb == "read":
                return MissingObjectError(f"there is no object {key} in {self.name}", "run flushpoint repository check")
            case errno.EACCES | errno.EPERM:
                return RefusedError(what, "give the worker's user read and write access to the whole directory")
            case errno.EROFS:
                return RefusedError(what, "mount its file system for writing")
            case number if number in _NO_ROOM:
                return StoreError(what, "make room there, or let retention remove points", errno_=error.errno)
            case number if number in _NO_LINKS:
                return StoreError(what, "take a file system with hard links", errno_=error.errno)
            case _:
                return StoreError(
                    what, "look at the kernel's log of the worker's host", errno_=error.errno or errno.EIO
                )

    def _no_root(self) -> NotFoundError:
        return NotFoundError(
            f"there is no directory {self._root} on this worker's host",
            "make it, or mount the file system that holds it",
        )

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """A descriptor of the object's file; OSErrors of the body are told as failed reads."""
        try:
            fd = os.open(self._path(key), _READ)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):  # the directory of other keys
                    raise FileNotFoundError(errno.ENOENT, key)
                yield fd
            finally:
                os.close(fd)
        except NotADirectoryError as error:  # an object where the key has a directory
            raise self.failed("read", key, FileNotFoundError(errno.ENOENT, key)) from error
        except OSError as error:
            raise self.failed("read", key, error) from error

    def _read_exactly(self, fd: int, key: str, offset: int, length: int) -> bytes:
        data = _read(fd, offset, length)
        if len(data) != length:
            raise ShortObjectError(
                f"{key} in {self.name} ends before byte {offset + length}", "run flushpoint repository check"
            )
        return data

    def _make_directories(self, directory: Path) -> None:
        """Down from the root, which is never made; each durable before anything is put into it.

        One that is there already may have been made a moment ago by a writer that has not synced it yet: so its
        parent is synced all the same, once.
        """
        if directory in self._durable and directory.is_dir():
            return
        if directory == self._root:
            raise FileNotFoundError(errno.ENOENT, str(directory))
        self._make_directories(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(_DIRECTORY_MODE)
        _sync_directory(directory.parent)
        self._durable.add(directory)

    def _walk(self, directory: str, prefix: str) -> Iterator[ObjectInfo]:
        """The objects below `directory` (a relative path) whose keys begin with `prefix`, sorted by key."""
        found = []
        try:
            for entry in _entries(self._root / directory):
                key = f"{directory}/{entry.name}" if directory else entry.name
                if entry.is_dir(follow_symlinks=False):
                    key += "/"
                if entry.name != TEMPORARY and key.startswith(prefix[: len(key)]):
                    found.append(key)
        except OSError as error:
            raise self.failed("list", directory, error) from error
        for key in sorted(found):  # "a/" sorts among the names as the keys below it do
            if key.endswith("/"):
                yield from self._walk(key[:-1], prefix)
            elif key.startswith(prefix):
                yield from self._info(key)

    def _info(self, key: str) -> Iterator[ObjectInfo]:
        """One, or none if it was deleted since its directory was read."""
        with contextlib.suppress(FileNotFoundError):
            status = (self._root / key).lstat()
            if stat.S_ISREG(status.st_mode):
                yield ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


class LocalUpload:
    """An Upload into the temporary file `path`, open as `fd`."""

    def __init__(self, store: LocalStore, key: str, target: Path, path: Path, fd: int) -> None:
        self._store = store
        self._key = key
        self._target = target
        self._path = path
        self._fd = fd

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise self._store.failed("write", self._key, error) from error

    def commit(self) -> None:
        try:
            os.fsync(self._fd)
            self._path.replace(self._target)
            _sync_directory(self._target.parent)
        except OSError as error:
            raise self._store.failed("write", self._key, error) from error

    def commit_if_absent(self) -> bool:
        """As `put_if_absent`. What is there already is durable too when this returns: the caller will rely on it."""
        try:
            os.fsync(self._fd)
            absent = self._link()
            _sync_directory(self._target.parent)
        except OSError as error:
            raise self._store.failed("write", self._key, error) from error
        return absent

    def _link(self) -> bool:
        try:
            os.link(self._path, self._target, follow_symlinks=False)
        except FileExistsError:
            # NFS repeats a request whose answer was lost, and then reports the link it has just made (open(2), O_EXCL).
            return os.fstat(self._fd).st_nlink == 2
        except (
            PermissionError
        ) as error:  # link(2): so says a file system that has none; the rest of the rights are there
            raise OSError(errno.EOPNOTSUPP, "no hard links") from error
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # renamed by commit, or left for abort_uploads
            self._path.unlink()
        os.close(self._fd)


def _read(fd: int, offset: int, length: int) -> bytes:
    """`length` bytes, or fewer where the file ends."""
    data = os.pread(fd, length, offset)
    if len(data) in (0, length):
        return data
    parts = [data]  # Linux reads 2 GiB at most in one call
    done = len(data)
    while done < length and (data := os.pread(fd, length - done, offset + done)):
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """None if the directory is not there."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
