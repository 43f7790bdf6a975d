import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from django.db import Error as DatabaseError
from django.db import close_old_connections, connection

from emails import context, deliveries, systemd
from emails.conf import conf
from emails.deliveries import BEGINNING_OF_TIME, Lease, Leased
from emails.queries import execute, load
from emails.queues import MAIL_QUEUE
from emails.services import CHANNEL, NOTIFY_SECONDS
from emails.tasks import deliver

logger = logging.getLogger(__name__)

SQL = load("emails.sql")
BATCH = 100
# While more than a batch is due. A message with one id costs as much as one with ten.
DELIVERIES_PER_MESSAGE = 20
LONGEST_PAUSE = 5  # seconds between tries while the broker or the database is down
CONFIRM_TIMEOUT = 5  # seconds
PUBLISHING_SECONDS = 15  # for one batch; what is left then is released
IDLE_SECONDS = 15  # the broker closes a connection that is silent for two heartbeats
STUCK_SECONDS = 120  # longer than any wait of a publisher for the broker or the database
REPAIR_SECONDS = 15  # between looks for lost publications and wrong due times
NOTIFY_SETTLE_SECONDS = 2 * NOTIFY_SECONDS
# A transaction that began so long ago may still commit deliveries that were due then.
FLOOR_MARGIN = timedelta(seconds=10)


class Publisher:
    """Publishes due deliveries over a broker connection of its own.

    It may crash, or run beside others, at any time: only the rows count.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.seen_alive = time.monotonic()
        self._connection: Any = None
        self._used = 0.0
        self._held = Lease()
        self._floor = BEGINNING_OF_TIME
        self._repaired = self._floor_reset = float("-inf")

    def publish_due(self) -> int:
        """Publishes up to BATCH due deliveries, the oldest first; returns how many it found.

        Raises what the broker's client raises; the deliveries concerned are due again.
        """
        floor = self._next_floor()
        if not deliveries.is_due(floor):
            return 0
        # First, so that nothing is leased while there is no broker.
        self._connect()
        held = self._held = deliveries.lease(BATCH, floor)
        self._reached(held)
        end = time.monotonic() + PUBLISHING_SECONDS
        together = DELIVERIES_PER_MESSAGE if held.found == BATCH else 1
        try:
            while held.deliveries and time.monotonic() < end and not self.stopping.is_set():
                self.seen_alive = time.monotonic()
                self._publish(held.deliveries[:together])
                del held.deliveries[:together]
        except BaseException:
            self.discard_connection()
            raise
        finally:
            self.release()
        return held.found

    def release(self) -> None:
        """Ends the leases of what is not published."""
        held, self._held = self._held, Lease()
        deliveries.release(held)

    def requeue_lost(self) -> None:
        """Has published again what RabbitMQ confirmed and lost."""
        self._repaired = time.monotonic()
        if not deliveries.is_waiting_for_worker():
            return
        self._connect()
        queue = MAIL_QUEUE.bind(self._connection.default_channel)
        waiting = queue.queue_declare(passive=True).message_count
        self._used = time.monotonic()
        if count := deliveries.requeue_lost(queue_is_empty=waiting == 0):
            logger.warning("%s publications were lost, published again", count)

    @property
    def repair_is_due(self) -> bool:
        return time.monotonic() - self._repaired > REPAIR_SECONDS

    def _next_floor(self) -> datetime:
        """From which due time on to look.

        Before it there is nothing but what vacuum can't remove yet, while an old transaction is
        open. Now and then everything is looked at, for what was committed late.
        """
        if time.monotonic() - self._floor_reset > REPAIR_SECONDS:
            self._floor_reset = time.monotonic()
            self._floor = BEGINNING_OF_TIME
        return self._floor

    def _reached(self, lease: Lease) -> None:
        if lease.reached is not None:
            self._floor = max(self._floor, lease.reached - FLOOR_MARGIN)

    def _connect(self) -> None:
        if self._connection is not None and time.monotonic() - self._used > IDLE_SECONDS:
            self.discard_connection()
        if self._connection is None:
            connection = deliver.app.connection_for_write(
                transport_options={
                    **deliver.app.conf.broker_transport_options,
                    "confirm_publish": True,
                }
            )
            connection.connect()
            self._connection = connection
            self._used = time.monotonic()

    def _publish(self, leased: Sequence[Leased]) -> None:
        """Returns when the broker has the message in a queue; takes seconds at most."""
        ids = {}
        if len(leased) == 1:
            ids = {"request_id": leased[0].request_id, "email_id": str(leased[0].email_id)}
        deliver.apply_async(
            [each.id for each in leased],
            producer=deliver.app.amqp.Producer(self._connection),
            queue=MAIL_QUEUE,
            headers=ids,
            mandatory=True,
            confirm_timeout=CONFIRM_TIMEOUT,
            retry=False,
        )
        self._used = time.monotonic()
        for each in leased:
            with context.bind(request_id=each.request_id, email_id=each.email_id):
                logger.debug("delivery %s published", each.id)

    def discard_connection(self) -> None:
        """Closes the connection without a goodbye: a broker that is stuck would not answer it."""
        if self._connection is not None:
            self._connection.collect()
            self._connection = None


class Relay:
    """Several publishers, woken when an email is stored, and at least each RELAY_POLL_SECONDS.

    `run` returns after `stop`, which may be called from a signal handler of the same thread.
    """

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._wake = threading.Semaphore(0)
        self._publishers = [Publisher() for _ in range(conf.RELAY_THREADS)]
        self._listening: Any = None
        self._down = False
        self._lock = threading.Lock()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._publish, args=(publisher,), daemon=True)
            for publisher in self._publishers
        ]
        for thread in threads:
            thread.start()
        systemd.notify("READY=1")
        repaired = float("-inf")
        while not self._stopping.is_set():
            try:
                close_old_connections()
                if time.monotonic() - repaired > REPAIR_SECONDS:
                    self._repair()
                    repaired = time.monotonic()
                self._wait()
            except DatabaseError as error:
                self._report_down("database", error)
                connection.close()
                self._stopping.wait(min(conf.RELAY_POLL_SECONDS, 1))
            self._wake.release()
            now = time.monotonic()
            if all(now - each.seen_alive < STUCK_SECONDS for each in self._publishers):
                systemd.notify("WATCHDOG=1")
        systemd.notify("STOPPING=1")
        self._end(threads)
        connection.close()

    def _repair(self) -> None:
        if count := deliveries.reset_impossible_due_times():
            logger.warning("%s deliveries had an impossible due time", count)
        with execute(SQL["merge_counters"]):
            pass

    def _wait(self) -> None:
        """Until an email is stored, or RELAY_POLL_SECONDS have passed."""
        connection.ensure_connection()
        if self._listening is not connection.connection:
            with connection.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
            self._listening = connection.connection
        deadline = time.monotonic() + min(conf.RELAY_POLL_SECONDS, 10)
        while not self._stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            # The driver's connection raises the driver's errors.
            with connection.wrap_database_errors:
                notifications = list(self._listening.notifies(timeout=min(left, 0.5), stop_after=1))
                if notifications:
                    # A later one may stand for emails that the next query doesn't see yet.
                    list(self._listening.notifies(timeout=0))
                    self._stopping.wait(NOTIFY_SETTLE_SECONDS)
                    return

    def _publish(self, publisher: Publisher) -> None:
        repairs = publisher is self._publishers[0]
        pause = 0.5
        while not self._stopping.is_set():
            publisher.seen_alive = time.monotonic()
            try:
                close_old_connections()
                found = publisher.publish_due()
                if repairs and publisher.repair_is_due:
                    publisher.requeue_lost()
            except DatabaseError as error:
                self._report_down("database", error)
                connection.close()
            except Exception as error:  # of the many kinds that the AMQP client raises
                self._report_down("broker", error)
                with suppress(DatabaseError), execute(SQL["count"], ("publish_failures", 1)):
                    pass
            else:
                pause = 0.5
                if found:
                    self._report_up()
                if found == BATCH:
                    self._wake.release()  # there is work for another one
                    continue
                self._wake.acquire(timeout=LONGEST_PAUSE)
                continue
            self._stopping.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        publisher.discard_connection()
        connection.close()

    def _end(self, threads: list[threading.Thread]) -> None:
        """Waits a second for publishers that wait for the broker, then releases what they hold."""
        for publisher in self._publishers:
            publisher.stopping.set()
        for _ in threads:
            self._wake.release()
        deadline = time.monotonic() + 1
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        for publisher, thread in zip(self._publishers, threads, strict=True):
            if thread.is_alive():
                with suppress(DatabaseError):
                    publisher.release()

    def _report_down(self, what: str, error: Exception) -> None:
        with self._lock:
            if not self._down:
                self._down = True
                logger.warning("the %s is unavailable, emails wait: %s", what, error)

    def _report_up(self) -> None:
        with self._lock:
            if self._down:
                self._down = False
                logger.info("publishing again")
