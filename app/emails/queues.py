"""The queues of this app."""

from kombu import Exchange, Queue

MAIL = "mail.v1"
MAINTENANCE = "maintenance.v1"
DEAD = "mail.dead.v1"
# A topic exchange, because with a direct one Celery keeps delayed messages in the worker.
EXCHANGE = Exchange("emails", type="topic")


def quorum_queue(name: str) -> Queue:
    # The type is the only argument, because the arguments of a queue can't be changed. Policies of
    # the broker set limits and dead-lettering. A queue with other arguments gets a new version.
    return Queue(name, EXCHANGE, routing_key=name, queue_arguments={"x-queue-type": "quorum"})


MAIL_QUEUE, MAINTENANCE_QUEUE = CONSUMED = [quorum_queue(MAIL), quorum_queue(MAINTENANCE)]
# Workers declare it, but none consumes it. Operators inspect it.
DEAD_LETTERS = quorum_queue(DEAD)
