"""The Celery worker application: its settings and what a child process does when it starts."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import socket

from celery import Celery
from celery.signals import worker_process_init, worker_shutting_down

from coordinator.broker import make_app
from coordinator.logs import configure_logs
from coordinator.model.messages import DOORBELL_TASK
from coordinator.settings import Settings
from workers.tasks import Doorman

_M_ARENA_MAX = -8  # <malloc.h>


def make_worker_app(settings: Settings) -> Celery:
    """The application with the one task there is: answer a doorbell."""
    app = make_app(settings)
    # Shared with the children, since Celery tells only the parent of a shutdown. A byte and no Event: one of its
    # locks would stay taken for ever by a child that is killed while it looks.
    closing = mmap.mmap(-1, 1)

    def close(**_: object) -> None:
        closing[0] = 1

    worker_shutting_down.connect(close, weak=False)
    doorman = Doorman(settings, lambda: closing[0] != 0)
    app.task(name=DOORBELL_TASK, ignore_result=True)(doorman.answer)
    worker_process_init.connect(_start_child, weak=False)
    return app


def hold_little_memory() -> None:
    """Before any thread is started. A thread's freed buffers, megabytes each, would otherwise stay in an arena of its
    own, for which every page is faulted in anew: a restore took three times the memory and a fifth more time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has neither it nor arenas
        libc.mallopt(_M_ARENA_MAX, 1)


def worker_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _start_child(**_: object) -> None:
    gc.freeze()  # what the parent has made stays for ever: nobody need look at it again and again
    configure_logs("mover")
