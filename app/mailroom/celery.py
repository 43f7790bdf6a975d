import os
import threading
import time

from celery import Celery, bootsteps, signals

from emails import systemd

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


class Systemd(bootsteps.StartStopStep):
    """Tells systemd that the worker is ready, and that it lives.

    Ready is a worker that consumes. A worker whose loop stands still says nothing more and is
    started anew; one that has lost the broker lives, however long it looks for it.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    PERIOD = 5  # seconds
    STUCK = 30

    def __init__(self, consumer, **_) -> None:
        self.timer = None
        self.ticked = None  # when the loop last ran; None while there is no connection
        self.thread = None
        self.stopping = threading.Event()

    def start(self, consumer) -> None:
        self.tick()
        self.timer = consumer.timer.call_repeatedly(self.PERIOD, self.tick)
        systemd.notify("READY=1")
        if self.thread is None:
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()

    def tick(self) -> None:
        self.ticked = time.monotonic()

    def stop(self, consumer) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.ticked = None

    def shutdown(self, consumer) -> None:
        self.stopping.set()
        systemd.notify("STOPPING=1")

    def watch(self) -> None:
        while not self.stopping.wait(self.PERIOD):
            ticked = self.ticked
            if ticked is None or time.monotonic() - ticked < self.STUCK:
                systemd.notify("WATCHDOG=1")


if os.environ.get("NOTIFY_SOCKET"):
    app.steps["consumer"].add(Systemd)


@signals.worker_process_shutdown.connect
def end_smtp(**_) -> None:
    """Imported late: it needs the settings, which need this module."""
    from emails import smtp

    smtp.forget()
