"""What all tests share: programs they need, a guest, a fast directory, how to repeat what hypothesis found."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

from tests.guest import GuestKit, NoGuestError, agent_files

_SYSTEM_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Servers such as nft and rabbitmq-server live here; the PATH of an ordinary user lacks it."""
_SHM = Path("/dev/shm")
_SHM_FREE_BYTES = 2 * 1024**3
"""Tests of whole disks write some hundred MiB each, two of them at a time."""

os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_PATHS])

settings.register_profile("flushpoint", print_blob=True, deadline=None)
settings.load_profile("flushpoint")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`needs(program, …)`: without it a laptop skips the test, and CI fails it."""
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if shutil.which(program) is None:
                _do_without(f"{program} is not on the PATH: `make system` installs it")


def _do_without(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def guest_kit() -> GuestKit:
    """What guests boot; without it a laptop skips the test, and CI fails it."""
    try:
        return GuestKit.get()
    except NoGuestError as error:
        reason = str(error)
    _do_without(reason)


@pytest.fixture(scope="session")
def guest_agent() -> Mapping[str, bytes]:
    """What a guest runs to be told from outside to freeze its file systems; missing, the same."""
    try:
        return agent_files()
    except NoGuestError as error:
        reason = str(error)
    _do_without(reason)


@pytest.fixture
def tmpfs_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is room for it, else on disk; gone after the test.

    Its path is short, so that unix sockets (107 bytes) fit in it.
    """
    with _in_memory(tmp_path) as path:
        yield path


@pytest.fixture(scope="module")
def module_tmpfs_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same, for what all tests of a module share."""
    with _in_memory(tmp_path_factory.mktemp("module")) as path:
        yield path


@contextmanager
def _in_memory(otherwise: Path) -> Iterator[Path]:
    if not _SHM.is_dir() or shutil.disk_usage(_SHM).free < _SHM_FREE_BYTES:
        yield otherwise
        return
    path = Path(tempfile.mkdtemp(prefix="flushpoint-", dir=_SHM))
    try:
        yield path
    finally:
        shutil.rmtree(path)
