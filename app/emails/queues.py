"""The queues of this app."""

from kombu import Exchange, Queue

MAIL = "mail.v1"
MAINTENANCE = "maintenance.v1"
DEAD = "mail.dead.v1"
# A topic exchange: with a direct exchange, Celery would keep delayed messages in the worker.
EXCHANGE = Exchange("emails", type="topic")


def quorum_queue(name: str) -> Queue:
    # The type is the only argument, because a queue's arguments can't be changed. The broker's
    # policies set limits and dead-lettering. For other arguments, declare a queue with a new
    # version.
    return Queue(name, EXCHANGE, routing_key=name, queue_arguments={"x-queue-type": "quorum"})


MAIL_QUEUE, MAINTENANCE_QUEUE = CONSUMED = [quorum_queue(MAIL), quorum_queue(MAINTENANCE)]
# Workers declare this queue, but no worker consumes it. Operators inspect it.
DEAD_LETTERS = quorum_queue(DEAD)
