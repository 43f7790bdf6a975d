"""The tasks of bench/broker_celery, with the broker settings of app/."""

from __future__ import annotations

import os

from celery import Celery
from kombu import Exchange, Queue

NAME = "mail.celery"

app = Celery("bench", broker=os.environ["BENCH_BROKER_URL"])
app.conf.update(
    task_queues=[Queue(NAME, Exchange("emails", "topic"), NAME, queue_arguments={"x-queue-type": "quorum"})],
    task_default_queue=NAME,
    task_default_exchange="emails",
    task_default_exchange_type="topic",
    task_default_routing_key=NAME,
    task_create_missing_queues=False,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_publish_retry=False,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "1")),
    broker_transport_options={"confirm_publish": True, "read_timeout": 5, "write_timeout": 5},
    control_queue_exclusive=False,
    control_queue_durable=True,
)


@app.task
def note(number):
    """Append the number to the file; a line of this length is written atomically."""
    with open(os.environ["BENCH_FILE"], "a") as file:
        file.write(f"{number}\n")
