"""Celery's settings for this app: `configure(app)` in a project's celery.py."""

from typing import Any

from celery import Celery, signals
from celery.utils.text import str_to_list

from emails.queues import CONSUMED

# The project's own settings win over these.
DEFAULTS: dict[str, Any] = {
    "worker_detect_quorum_queues": True,
    "broker_native_delayed_delivery_queue_type": "classic",
    # Workers outlive any outage of the broker. Publishing ends in bounded time even if the broker
    # has stopped reading (an alarm of memory or disk), and is not repeated: each try that timed
    # out may have left a copy.
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_connection_timeout": 4,
    "broker_heartbeat": 30,
    "broker_pool_limit": 4,
    "broker_pool_acquire_timeout": 5,
    "broker_transport_options": {
        "read_timeout": 5,
        "write_timeout": 5,
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0.2,
        "interval_max": 0.5,
    },
    "task_publish_retry": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    # With an exclusive control queue a worker exits when it reconnects before the broker noticed
    # that the old connection is gone; RabbitMQ 4.3 refuses one that is neither exclusive nor
    # durable.
    "control_queue_exclusive": False,
    "control_queue_durable": True,
    "event_queue_exclusive": True,
}


def configure(app: Celery) -> None:
    """Makes a project's Celery application ready for the tasks of this app.

    Call it in celery.py after config_from_object().
    """
    if app.configured:
        _add_defaults(app.conf)
    app.on_after_configure.connect(_add_defaults, weak=False)
    signals.celeryd_init.connect(_prepare_worker, weak=False)


def _add_defaults(source: Any, **_: Any) -> None:
    """Celery's own add_defaults() would win over the project's settings."""
    for maps in (source.maps, source.defaults):
        maps.insert(-1, DEFAULTS)


def _prepare_worker(instance: Any, options: dict[str, Any], **_: Any) -> None:
    """Prepares a worker of these queues. Other workers of the project stay as they are.

    If one of its queues is a quorum queue, Celery handles tasks with an eta in another way. So no
    other process gets these queues.
    """
    queues = instance.app.amqp.queues
    names = str_to_list(options.get("queues")) or list(queues)
    consumed = [queue for queue in CONSUMED if queue.name in names]
    if not consumed:
        return
    for queue in consumed:
        if queue.name not in queues:
            queues.add(queue)
    # Imported late: only workers need the module.
    from emails import worker

    worker.prepare(instance.app)
