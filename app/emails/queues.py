"""The queues of this app."""

from kombu import Exchange, Queue

MAIL = "mail.v1"
MAINTENANCE = "maintenance.v1"
DEAD = "mail.dead.v1"
# A topic exchange: with a direct one Celery holds delayed messages back in the worker.
EXCHANGE = Exchange("emails", type="topic")


def quorum_queue(name: str) -> Queue:
    # The type is the only argument, since the arguments of a queue can't be changed. Limits and
    # dead-lettering are policies of the broker. A queue that must differ gets a new version.
    return Queue(name, EXCHANGE, routing_key=name, queue_arguments={"x-queue-type": "quorum"})


MAIL_QUEUE, MAINTENANCE_QUEUE = CONSUMED = [quorum_queue(MAIL), quorum_queue(MAINTENANCE)]
# Workers declare it and nobody consumes it: a person looks at it.
DEAD_LETTERS = quorum_queue(DEAD)
