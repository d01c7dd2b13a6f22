"""qcow2 images as `qemu-img` describes and makes them.

An image is untrusted: its header names other files. So each image of a chain is asked for on its own
(`qemu-img info` opens no backing file and, since the fix of CVE-2024-32498, no data file), each name is
checked before it is opened, and the chain is then opened by a description of ours, not by the headers'.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coordinator.model.errors import DiskIOError, FlushpointError, NotFoundError, RefusedError, UnavailableError
from coordinator.model.point import TRACKING
from workers.access import Access

TOOL_TIMEOUT_S = 30.0
"""No call of qemu-img here reads data; one that takes longer hangs on its file system."""
MAX_CHAIN = 256
"""Images in one backing chain; each costs a call of qemu-img."""


class ImageInUseError(RefusedError):
    """Another process holds locks on the image that exclude what was asked."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    name: str
    granularity: int
    inconsistent: bool
    """The "in-use" flag: its writer lives, or died without storing it."""
    enabled: bool
    """The "auto" flag: it records what is written."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a chain; `virtual_size` in bytes, `backing` is the next one below."""

    path: str
    format: Literal["raw", "qcow2"]
    virtual_size: int
    bitmaps: tuple[Bitmap, ...] = ()
    backing: Image | None = None

    def chain(self) -> tuple[Image, ...]:
        return (self, *(self.backing.chain() if self.backing else ()))

    def node(self) -> dict[str, Any]:
        """The chain as a QAPI BlockdevOptions that leaves nothing to the images' headers."""
        node: dict[str, Any] = {
            "driver": self.format,
            "file": {"driver": protocol_of(self.path), "filename": self.path},
        }
        if self.format == "qcow2":
            node["backing"] = self.backing.node() if self.backing else None
        return node


def protocol_of(path: str) -> Literal["file", "host_device"]:
    """QEMU's driver for it: `file` does not open a block device."""
    return "host_device" if Path(path).is_block_device() else "file"


def inspect(path: str, access: Access) -> Image:
    """The qcow2 image at `path` (already checked) and its chain, every file of it checked.

    RefusedError for what is no qcow2 image, has an external data file, or a backing file that is outside
    the allowed roots, is no plain path or has no explicit format. NotFoundError for a missing backing file.
    """
    chain: list[tuple[str, dict[str, Any]]] = []
    next_path: str | None = path
    raw_base: Image | None = None
    while next_path is not None:
        if next_path in (seen for seen, _ in chain):
            raise RefusedError(
                f"the backing chain of {path} comes back to {next_path}", "repair it with qemu-img rebase"
            )
        if len(chain) == MAX_CHAIN:
            raise RefusedError(f"the backing chain of {path} has more than {MAX_CHAIN} images", "flatten it")
        info = _info(next_path)
        chain.append((next_path, info))
        next_path, raw_base = _backing_of(chain[-1][0], info, access)
    below = raw_base
    for image_path, info in reversed(chain):
        below = Image(image_path, "qcow2", int(info["virtual-size"]), _bitmaps(info), below)
    assert below is not None
    return below


def create_qcow2(path: str, size: int) -> None:
    """Make, or make anew, a qcow2 image at `path`. ImageInUseError if it is open, DiskIOError without room."""
    qemu_img("create", "-q", "-f", "qcow2", "--", path, str(size))


def bitmap_for_reading(image: Image, name: str, has_writer: bool) -> Bitmap:
    """The image's own bitmap `name`, if what it says can be trusted.

    NotFoundError names the bitmaps there are; RefusedError for one that is in use or was left behind.
    """
    for bitmap in image.bitmaps:
        if bitmap.name != name:
            continue
        if has_writer:
            raise RefusedError(
                f"bitmap {name!r} of {image.path} belongs to a process that has the image open for writing",
                "name the export of that process as source, or compare with --sync incremental",
            )
        if bitmap.inconsistent:
            raise RefusedError(
                f"bitmap {name!r} of {image.path} is inconsistent: its last writer did not store it",
                "compare with --sync incremental, and remove it with qemu-img bitmap --remove",
            )
        if name.startswith(TRACKING) and image.backing is not None:
            raise RefusedError(
                f"bitmap {name!r} of {image.path} does not know of changes to its backing file, {image.backing.path}",
                "compare with --sync incremental",
            )
        if name.startswith(TRACKING) and not bitmap.enabled:
            raise RefusedError(
                f"bitmap {name!r} of {image.path} is disabled, so that it does not know all that was written",
                "remove it with qemu-img bitmap --remove",
            )
        return bitmap
    there = ", ".join(sorted(b.name for b in image.bitmaps)) or "none"
    raise NotFoundError(f"{image.path} has no bitmap {name!r}; it has: {there}", "name one of these")


def _info(path: str) -> dict[str, Any]:
    # --force-share: an image that a guest is writing can be described; nothing is read but its header.
    text = qemu_img("info", "--output=json", "--force-share", "-f", "qcow2", "--", path)
    info: dict[str, Any] = json.loads(text)
    data = info.get("format-specific", {}).get("data", {})
    if "data-file" in data:
        raise RefusedError(
            f"{path} keeps its data in an external file, {data['data-file']}",
            "copy it into an image without one with qemu-img convert",
        )
    if "encrypt" in data or info.get("encrypted"):
        raise RefusedError(f"{path} is encrypted by QEMU", "serve it with qemu-nbd and name that export")
    return info


def _bitmaps(info: dict[str, Any]) -> tuple[Bitmap, ...]:
    listed = info.get("format-specific", {}).get("data", {}).get("bitmaps", [])
    return tuple(Bitmap(b["name"], int(b["granularity"]), "in-use" in b["flags"], "auto" in b["flags"]) for b in listed)


def _backing_of(path: str, info: dict[str, Any], access: Access) -> tuple[str | None, Image | None]:
    """(the next qcow2 image of the chain, None), or (None, the raw image at its end), or (None, None)."""
    name = info.get("backing-filename")
    if name is None:
        return None, None
    kind = info.get("backing-filename-format")
    if kind not in ("raw", "qcow2"):
        raise RefusedError(
            f"{path} names its backing file {name!r} without a format we read ({kind or 'none given'})",
            "set it with qemu-img rebase -u -F qcow2 (or raw) -b FILE",
        )
    if ":" in name.split("/", 1)[0]:  # QEMU takes what is before it for a protocol: json:, nbd:, file:
        raise RefusedError(f"the backing file of {path} is no plain path: {name!r}", "copy through an NBD export")
    try:
        resolved = access.check_path(str(Path(path).parent / name), must_exist=True)
    except NotFoundError as error:
        raise NotFoundError(
            f"{path} needs its backing file {name!r}, which does not exist",
            "restore it, or repair with qemu-img rebase",
        ) from error
    if kind == "qcow2":
        return resolved, None
    try:
        with Path(resolved).open("rb") as file:
            return None, Image(resolved, "raw", file.seek(0, os.SEEK_END))
    except OSError as error:
        raise RefusedError(
            f"{resolved}, the backing file of {path}, cannot be read: {error.strerror}", "give the worker's user access"
        ) from error


def qemu_img(*arguments: str) -> str:
    """Its standard output; what it wrote to the other one as an error, when it fails."""
    command = ["qemu-img", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise UnavailableError("qemu-img is not on the worker's PATH", "install qemu-utils") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"qemu-img did not answer about {arguments[-1]} in {TOOL_TIMEOUT_S:g} s", "look at its file system"
        ) from None
    if done.returncode == 0:
        return done.stdout
    raise refusal(done.stderr, command)


def refusal(stderr: str, command: list[str]) -> FlushpointError:
    """What a QEMU tool wrote before it gave up, as an error with a remedy."""
    message = " ".join(stderr.split()).removeprefix(f"{command[0]}: ") or f"{command[0]} failed without a word"
    if os.strerror(errno.ENOSPC) in message:
        return DiskIOError(message, errno_=errno.ENOSPC, remedy="make room for it")
    if "No such file" in message:
        return NotFoundError(message, "check the path on the worker's host")
    if '" lock' in message:  # Failed to get [shared] "write" lock
        return ImageInUseError(message, "stop the process that has the image open, or name its NBD export")
    if "not in qcow2 format" in message:
        return RefusedError(message, "add ?format=raw if it is a raw disk")
    if "Permission denied" in message:
        return RefusedError(message, "give the worker's user access to the file and its directory")
    if "Read-only file system" in message:
        return RefusedError(message, "name a file on a file system that can be written")
    return RefusedError(message, "look at it with qemu-img info on the worker's host")
