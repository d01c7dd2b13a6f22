"""The Celery worker application: its settings and what a child process does when it starts."""

from __future__ import annotations

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


def worker_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _start_child(**_: object) -> None:
    configure_logs("mover")
