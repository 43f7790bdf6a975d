"""Celery's settings for this app: `configure(app)` in a project's celery.py."""

from typing import Any

from celery import Celery, signals
from celery.utils.text import str_to_list

from emails.queues import CONSUMED

# The project's settings override these settings.
DEFAULTS: dict[str, Any] = {
    "worker_detect_quorum_queues": True,
    "broker_native_delayed_delivery_queue_type": "classic",
    # Workers survive any outage of the broker. Publishing has a timeout, because a broker with a
    # memory or disk alarm stops reading. Publishing is not retried, because an attempt that timed
    # out may have published the message.
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
    # With an exclusive control queue, a worker exits if it reconnects before the broker has
    # noticed the loss of the old connection. RabbitMQ 4.3 refuses queues that are neither exclusive
    # nor durable.
    "control_queue_exclusive": False,
    "control_queue_durable": True,
    "event_queue_exclusive": True,
}


def configure(app: Celery) -> None:
    """Configures a project's Celery application for the tasks of this app.

    Call it in celery.py after config_from_object().
    """
    if app.configured:
        _add_defaults(app.conf)
    app.on_after_configure.connect(_add_defaults, weak=False)
    signals.celeryd_init.connect(_prepare_worker, weak=False)


def _add_defaults(source: Any, **_: Any) -> None:
    """Celery's add_defaults() is not used, because it would override the project's settings."""
    for maps in (source.maps, source.defaults):
        maps.insert(-1, DEFAULTS)


def _prepare_worker(instance: Any, options: dict[str, Any], **_: Any) -> None:
    """Prepares a worker that consumes this app's queues. Other workers are not changed.

    Celery handles tasks with an eta differently if a process has a quorum queue. So no other
    process gets these queues.
    """
    queues = instance.app.amqp.queues
    names = str_to_list(options.get("queues")) or list(queues)
    consumed = [queue for queue in CONSUMED if queue.name in names]
    if not consumed:
        return
    for queue in consumed:
        if queue.name not in queues:
            queues.add(queue)
    # The import is here, because only workers need the module.
    from emails import worker

    worker.prepare(instance.app)
