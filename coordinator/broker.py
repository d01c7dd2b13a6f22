"""The Celery application that carries doorbells; each setting with its reason."""

from __future__ import annotations

from urllib.parse import urlsplit

from celery import Celery
from kombu import Queue

from coordinator.model.messages import DOORBELL_TASK, MOVER_ROLE, Doorbell
from coordinator.settings import Settings

SILENCE_S = 5.0
"""RabbitMQ: how long it may take to confirm a doorbell, or to answer at all. Without a limit a broker that hangs would
be waited for until it is back, and one that is gone without a word for ever."""


def queue_of(role: str) -> str:
    return f"flushpoint.{role}"


def make_app(settings: Settings) -> Celery:
    """The application of coordinator (which only sends) and workers (which add the task)."""
    app = Celery("flushpoint", broker=settings.broker_url, set_as_current=False)
    is_redis = urlsplit(settings.broker_url).scheme.startswith("redis")
    app.conf.update(
        accept_content=["json"],  # pickle would let whoever reaches the broker run code
        task_serializer="json",
        task_ignore_result=True,  # the ledger is the record; results are no state
        worker_prefetch_multiplier=1,  # a doorbell hidden in a busy worker wakes nobody
        worker_disable_prefetch=is_redis,  # only the Redis transport can do without any prefetch
        task_acks_late=False,  # losing a doorbell is harmless, repeating a poison one is not
        worker_send_task_events=False,  # thousands of messages a second in large fleets
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        worker_max_tasks_per_child=None,
        worker_soft_shutdown_timeout=settings.unit_slice_s,  # lets a unit end before the children are killed
        task_queues=[
            Queue(
                queue_of(MOVER_ROLE),
                # RabbitMQ: quorum queues survive a node; the Redis transport ignores the argument.
                queue_arguments=None if is_redis else {"x-queue-type": "quorum"},
            )
        ],
        task_default_queue=queue_of(MOVER_ROLE),
        task_create_missing_queues=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # of a worker, which would end after the default, an outage of an hour
        broker_pool_limit=4,
        broker_transport_options=_redis_options(settings) if is_redis else _amqp_options(),
        worker_detect_quorum_queues=True,
    )
    return app


def ring(app: Celery, bell: Doorbell) -> None:
    """Send one doorbell; kombu's OperationalError when the broker is away."""
    app.send_task(
        DOORBELL_TASK,
        args=[bell.model_dump()],
        queue=queue_of(bell.role),
        retry=False,  # the next cycle rings again
        confirm_timeout=SILENCE_S,
    )


def _amqp_options() -> dict[str, object]:
    return {
        "confirm_publish": True,
        "read_timeout": SILENCE_S,  # also while the connection of an unconfirmed doorbell is closed
        "write_timeout": SILENCE_S,
    }


def _redis_options(settings: Settings) -> dict[str, object]:
    return {
        "visibility_timeout": settings.visibility_timeout_s,
        "socket_timeout": 15.0,  # redis-py's default is none: a half-open connection would hang for ever
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }
