"""A regular file or block device held open: what raw sources and raw targets share."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import Self

from coordinator.model.errors import DiskIOError, Next, NotFoundError, RefusedError
from coordinator.model.extent import Extent, Status
from workers.access import Access
from workers.sources.identity import Identity, beneath_device, identity_of_file

_BLKROGET = 0x125E  # <linux/fs.h>: 1 for a read-only device, int
_BLKSSZGET = 0x1268  # <linux/fs.h>: logical sector size, int


class RawDisk:
    """An open file or device. `fd` is valid until close(); `size` is what it was when opened, in bytes."""

    def __init__(self, path: str, fd: int) -> None:
        status = os.fstat(fd)
        self.path = path
        self.fd = fd
        self.is_device = stat.S_ISBLK(status.st_mode)
        self._status = status
        self.size = os.lseek(fd, 0, os.SEEK_END) if self.is_device else status.st_size
        self.block_size = _asked(fd, _BLKSSZGET) if self.is_device else 1

    @classmethod
    def open(cls, path: str, flags: int, access: Access, mode: int = 0o600) -> Self:
        """Open `path` if `access` allows it, and what was opened is where it was thought to be.

        NotFoundError or RefusedError name the path. Nothing but regular files and block devices is opened.
        """
        resolved = access.check_path(path, must_exist=not flags & os.O_CREAT)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its other end. It means nothing to a file.
            fd = os.open(resolved, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
        except OSError as error:
            raise _opening_failed(path, flags, error) from error
        try:
            kind = os.fstat(fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise RefusedError(f"{path} is neither a regular file nor a block device", "name the disk itself")
            access.check_open_file(fd, path)
            # Linux lets root open a read-only device for writing; only the writes would fail.
            if stat.S_ISBLK(kind) and _writes(flags) and _asked(fd, _BLKROGET):
                raise _opening_failed(path, flags, OSError(errno.EROFS, "the device is read-only"))
            return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise

    def is_claimed(self) -> bool:
        """Whether somebody holds this block device for himself: a mounted file system, LVM, RAID."""
        if not self.is_device:
            return False
        try:
            os.close(os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EBUSY
        return False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer, or DiskIOError; a file that became shorter is an error, not zeroes."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self.failed("read", offset + done, len(buffer) - done, error) from error
            if count == 0:
                raise DiskIOError(
                    f"{self.path} ends before byte {offset + len(buffer)}: it is shorter than when it was opened",
                    offset=offset + done,
                    length=len(buffer) - done,
                    next_=Next.GIVE_UP,
                    remedy="do not resize a disk while it is copied",
                )
            done += count

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data and holes of the range, gapless. Holes are what the file system calls holes."""
        end = offset + length
        if self.is_device:  # lseek knows no holes there
            yield Extent(offset, length, Status.DATA)
            return
        # The position that lseek leaves behind is shared between threads, but nothing here reads by it.
        while offset < end:
            data = min(self._seek(offset, os.SEEK_DATA, end), end)
            yield Extent(offset, data - offset, Status.HOLE)
            if data == end:
                return
            # At least one byte, or a file that is changed between the two calls would hold us here.
            hole = min(max(self._seek(data, os.SEEK_HOLE, end), data + 1), end)
            yield Extent(data, hole - data, Status.DATA)
            offset = hole

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as error:
            # ENXIO: nothing but a hole up to the end of the file, provided that the file still ends there.
            if error.errno == errno.ENXIO and os.fstat(self.fd).st_size >= self.size:
                return end
            raise DiskIOError(
                f"cannot look for holes of {self.path}: {error.strerror}",
                errno_=error.errno or errno.EIO,
                offset=offset,
                length=end - offset,
                next_=Next.RETRY,
            ) from error

    def identity(self) -> Identity:
        return identity_of_file(self._status)

    def lies_on(self) -> frozenset[Identity]:
        """`identity()`, and the file behind a loop device."""
        beneath = beneath_device(self._status.st_rdev) if self.is_device else frozenset()
        return beneath | {self.identity()}

    def stamp(self) -> str:
        """Size and time of the last write to a file, as they are now; "" for a device."""
        if self.is_device:
            return ""
        now = os.fstat(self.fd)
        return f"{now.st_size}:{now.st_mtime_ns}"

    def failed(self, verb: str, offset: int, length: int, error: OSError, next_: Next = Next.RETRY) -> DiskIOError:
        number = error.errno or errno.EIO
        remedy = "make room for it" if number in (errno.ENOSPC, errno.EDQUOT) else "look at the kernel's log"
        where = f" {length} bytes at {offset}" if length else ""
        return DiskIOError(
            f"cannot {verb}{where} of {self.path}: {os.strerror(number)}",
            errno_=number,
            offset=offset,
            length=length,
            next_=next_,
            remedy=remedy,
        )

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _asked(fd: int, request: int) -> int:
    """The int that an ioctl answers."""
    answer = array.array("i", [0])
    fcntl.ioctl(fd, request, answer)
    return answer[0]


def _writes(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


def _opening_failed(path: str, flags: int, error: OSError) -> RefusedError:
    verb = "written" if _writes(flags) else "read"
    match error.errno:
        case errno.ENOENT:
            return NotFoundError(f"{path} does not exist", "check the path on the worker's host")
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return RefusedError(
                f"{path} cannot be {verb}: {error.strerror}", "give the worker's user access, or name another disk"
            )
        case errno.EEXIST:
            return RefusedError(f"{path} appeared while it was being made", "try again")
        case errno.ELOOP:
            return RefusedError(f"{path} became a symbolic link while it was opened", "name the file itself")
        case errno.ENXIO:
            return RefusedError(f"{path} is neither a regular file nor a block device", "name the disk itself")
        case _:
            return RefusedError(f"{path} cannot be opened: {error.strerror}", "look at the worker's host")
