"""Extensions of the Celery worker: queues, systemd's watchdog, and a consumer that survives
malformed messages."""

import bz2
import logging
import lzma
import os
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import kombu.compression
from celery import Celery, bootsteps, signals
from celery.worker import consumer as celery_consumer
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle
from celery.worker.control import Panel, inspect_command
from kombu.exceptions import ContentDisallowed, DecodeError

from emails import smtp, systemd
from emails.conf import conf
from emails.queues import DEAD_LETTERS

logger = logging.getLogger(__name__)

# The only control commands that Flower and `celery inspect` need. With the other commands, anybody
# who may publish to a worker could shut it down or starve it.
CONTROL_COMMANDS = {
    *("ping", "stats", "report", "conf", "enable_events"),
    *("active", "active_queues", "registered", "reserved", "revoked", "scheduled", "query_task"),
}
# The settings that `inspect conf` shows. Other settings may contain secrets.
SHOWN_SETTINGS = (
    *("accept_content", "broker_heartbeat", "broker_pool_limit", "enable_utc", "timezone"),
    *("task_acks_late", "task_default_queue", "task_ignore_result", "task_serializer"),
    *("task_soft_time_limit", "task_time_limit", "worker_concurrency", "worker_consumer"),
    *("worker_max_memory_per_child", "worker_max_tasks_per_child", "worker_pool"),
    *("worker_prefetch_multiplier", "worker_send_task_events"),
)


def prepare(app: Celery) -> None:
    """Adds bootsteps, and limits messages and control commands, before a worker starts."""
    app.conf.worker_consumer = "emails.worker:Consumer"
    app.steps["consumer"].add(DeclareQueues)
    # Celery binds every queue to its exchanges for delayed messages, so all queues must exist.
    DelayedDelivery.requires = (*DelayedDelivery.requires, DeclareQueues)
    if os.environ.get("NOTIFY_SOCKET"):
        app.steps["consumer"].add(Systemd)
    for name in set(Panel.data) - CONTROL_COMMANDS:
        del Panel.data[name]
    inspect_command(name="conf")(shown_settings)
    # Gossip and Mingle need the command "hello", which can revoke tasks. They also accept tasks
    # from anybody who may publish an event.
    for step in (Gossip, Mingle):
        step.compatible_transports = frozenset()
    bound_decompression()
    signals.worker_process_shutdown.connect(lambda **_: smtp.close(), weak=False)


def shown_settings(state: Any, with_defaults: bool = False, **_: Any) -> dict[str, Any]:
    """The worker's settings without secrets."""
    return {name: repr(getattr(state.app.conf, name, None)) for name in SHOWN_SETTINGS}


# ---- Malformed messages ----


def bound_decompression() -> None:
    """Limits decompression, because kombu decompresses a message before a consumer can check it."""
    decoders: dict[str, Callable[[], Any]] = {
        "application/x-gzip": zlib.decompressobj,
        "application/x-bz2": bz2.BZ2Decompressor,
        "application/x-lzma": lzma.LZMADecompressor,
    }
    for content_type in list(kombu.compression._decoders):
        if content_type in decoders:
            bounded = bounded_decoder(decoders[content_type])
            kombu.compression._decoders[content_type] = bounded
        else:
            del kombu.compression._decoders[content_type]


def bounded_decoder(make: Callable[[], Any]) -> Callable[[bytes], bytes]:
    def decode(data: bytes) -> bytes:
        decompressor = make()
        decoded: bytes = decompressor.decompress(data, conf.MAX_EMAIL_BYTES)
        if not decompressor.eof:
            raise DecodeError("the decompressed body is too large or invalid")
        return decoded

    return decode


class Consumer(celery_consumer.Consumer):  # type: ignore[misc]
    """Dead-letters messages that Celery can't handle. Their bodies are never logged."""

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
        handle = super().create_task_handler(*arguments, **options)

        def on_task_received(message: Any) -> Any:
            try:
                if problem := self.problem(message):
                    return self.dead_letter(message, problem)
                return handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:
                return self.dead_letter(message, type(error).__name__)

        return on_task_received

    def problem(self, message: Any) -> str | None:
        """The error in a message for this app's tasks, or None. Other tasks are not checked."""
        if message.errors:
            return "it can't be decompressed"
        if len(message.body or b"") > conf.MAX_EMAIL_BYTES:
            return "its body is too large"
        headers = message.headers if isinstance(message.headers, dict) else {}
        name = headers.get("task")
        if not isinstance(name, str) or not name.startswith("emails.tasks."):
            return None if isinstance(name, str) else "it names no task"
        if headers.get("eta") or headers.get("expires"):
            return "it has an eta or expires, which this app never sets"
        try:
            if message.content_type != "application/json":
                return "its content type is not JSON"
            args, kwargs, embed = message.decode()
        except (ContentDisallowed, DecodeError, ValueError, TypeError):
            return "its body is not that of a task"
        if (
            not isinstance(args, list)
            or not isinstance(kwargs, dict)
            or not isinstance(embed, dict)
        ):
            return "its body is not that of a task"
        if name == "emails.tasks.deliver":
            good = not kwargs and all(type(each) is int and 0 < each < 2**63 for each in args)
            return None if good else "its arguments are not ids"
        return None

    def dead_letter(self, message: Any, problem: str) -> None:
        logger.error("a message was dead-lettered: %s", problem)
        if not message.acknowledged:
            message.reject_log_error(logger, self.connection_errors)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self.dead_letter(message, "it names no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self.dead_letter(message, "its task is unknown")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self.dead_letter(message, type(exc).__name__)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self.dead_letter(message, type(exc).__name__)


# ---- Bootsteps ----


class DeclareQueues(bootsteps.StartStopStep):  # type: ignore[misc]
    """Declares all queues of the project on each connection to the broker.

    Celery declares only the queues that the worker consumes. No worker consumes dead letters.
    """

    requires = ("celery.worker.consumer.connection:Connection",)

    def start(self, consumer: Any) -> None:
        with consumer.connection.channel() as channel:
            for queue in (*consumer.app.amqp.queues.values(), DEAD_LETTERS):
                queue.bind(channel).declare()


class Systemd(bootsteps.StartStopStep):  # type: ignore[misc]
    """Notifies systemd when the worker is ready, and pings the watchdog.

    The worker is ready when it consumes. When its event loop is stuck, pings stop, and systemd
    restarts the worker. While it reconnects to the broker, pings continue.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    PERIOD = 5  # seconds
    STUCK = 30

    def __init__(self, consumer: Any, **_: Any) -> None:
        self.timer: Any = None
        self.ticked: float | None = None  # when the loop last ran; None without a connection
        self.thread: threading.Thread | None = None
        self.stopping = threading.Event()

    def start(self, consumer: Any) -> None:
        self.tick()
        self.timer = consumer.timer.call_repeatedly(self.PERIOD, self.tick)
        systemd.notify("READY=1")
        if self.thread is None:
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()

    def tick(self) -> None:
        self.ticked = time.monotonic()

    def stop(self, consumer: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.ticked = None

    def shutdown(self, consumer: Any) -> None:
        self.stopping.set()
        systemd.notify("STOPPING=1")

    def watch(self) -> None:
        while not self.stopping.wait(self.PERIOD):
            ticked = self.ticked
            if ticked is None or time.monotonic() - ticked < self.STUCK:
                systemd.notify("WATCHDOG=1")
