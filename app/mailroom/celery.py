import os

from celery import Celery, bootsteps, signals

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mailroom.settings")

app = Celery("mailroom")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


class DeclareQueues(bootsteps.StartStopStep):
    """Declares every queue of the project, on each connection to the broker.

    A worker by itself declares only what it consumes, and nobody consumes the dead queue.
    """

    requires = ("celery.worker.consumer.connection:Connection",)

    def start(self, consumer) -> None:
        with consumer.connection.channel() as channel:
            for queue in consumer.app.amqp.queues.values():
                queue.bind(channel).declare()


app.steps["consumer"].add(DeclareQueues)


@signals.celeryd_init.connect
def declare_before_binding(**_) -> None:
    """Celery binds every queue to its exchanges for delayed messages, so all must exist by then.

    Imported late: only workers need this module.
    """
    from celery.worker.consumer.delayed_delivery import DelayedDelivery

    DelayedDelivery.requires = (*DelayedDelivery.requires, DeclareQueues)


@signals.setup_logging.connect
def keep_django_logging(**_) -> None:
    """A receiver on this signal is what keeps Celery from replacing Django's LOGGING."""
