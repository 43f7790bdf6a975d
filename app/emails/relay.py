import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from django.conf import settings
from django.db import Error as DatabaseError
from django.db import close_old_connections, connection

from emails import context, systemd
from emails.models import PUBLISHING_LEASE, Delivery, Tally
from emails.services import CHANNEL, WAKE_SECONDS
from emails.tasks import deliver

logger = logging.getLogger(__name__)

BATCH = 50
TOGETHER = 10  # deliveries a message, while there are more than a batch: a message costs as much
LONGEST_PAUSE = 5  # seconds between tries while the broker or the database is down
CONFIRM_TIMEOUT = 5  # seconds
# One publication more ends before the lease does.
PUBLISHING_SECONDS = PUBLISHING_LEASE.total_seconds() - 15
IDLE_SECONDS = 15  # the broker ends a connection that says nothing for two heartbeats
# Nothing takes a publisher this long: its waits for the broker and the database have limits.
STUCK_SECONDS = 120
CLOCK_SECONDS = 30  # between looks for what a wrong clock has done
SETTLE_SECONDS = 2 * WAKE_SECONDS  # what comes within it is taken together


class Publisher:
    """Publishes due deliveries over a broker connection of its own.

    The rows are the truth, so it may crash, or run beside others, at any time.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.seen_alive = time.monotonic()
        self._connection = None
        self._used = 0.0
        self._held: list[Delivery] = []

    def publish_due(self) -> int:
        """Publishes up to BATCH due deliveries, the oldest first; returns how many it took.

        Raises what the broker's client raises, with the deliveries concerned due again.
        """
        if not Delivery.objects.due().exists():
            return 0
        self._connect()
        self._held, published = Delivery.objects.lease(BATCH), []
        count, until = len(self._held), time.monotonic() + PUBLISHING_SECONDS
        together = TOGETHER if count == BATCH else 1
        try:
            while self._held and time.monotonic() < until and not self.stopping.is_set():
                self.seen_alive = time.monotonic()
                self._publish(self._held[:together])
                published += self._held[:together]
                del self._held[:together]
        except BaseException:
            self.discard_connection()
            raise
        finally:
            self.release()
            Delivery.objects.published(published)
        return count

    def release(self) -> None:
        """Gives back what is leased and not published."""
        held, self._held = self._held, []
        Delivery.objects.release(held)

    def _connect(self) -> None:
        """First, so that nothing is leased while there is no broker."""
        if self._connection is not None and time.monotonic() - self._used > IDLE_SECONDS:
            self.discard_connection()
        if self._connection is None:
            connection = deliver.app.connection_for_write(
                transport_options={"confirm_publish": True}
            )
            connection.connect()
            self._connection = connection
            self._used = time.monotonic()

    def _publish(self, deliveries: Sequence[Delivery]) -> None:
        """Returns once the broker has the message in a queue; takes seconds at the very most."""
        ids = {}
        if len(deliveries) == 1:
            email = deliveries[0].email
            ids = {"request_id": email.request_id, "email_id": str(email.pk)}
        deliver.apply_async(
            [delivery.pk for delivery in deliveries],
            producer=deliver.app.amqp.Producer(self._connection),
            headers=ids,
            mandatory=True,
            confirm_timeout=CONFIRM_TIMEOUT,
            retry=False,
        )
        self._used = time.monotonic()
        for delivery in deliveries:
            email = delivery.email
            with context.bind(request_id=email.request_id, email_id=email.pk):
                logger.debug("delivery %s published", delivery.pk)

    def discard_connection(self) -> None:
        """Drops the connection without a farewell: a broker that is stuck wouldn't answer it."""
        if self._connection is not None:
            self._connection.collect()
            self._connection = None


class Relay:
    """Several publishers, woken when an email is stored, and at least every RELAY_POLL_SECONDS.

    `run` returns after `stop`, which may be called from a signal handler of the same thread.
    """

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._wake = threading.Semaphore(0)
        self._publishers = [Publisher() for _ in range(settings.RELAY_THREADS)]
        self._idle = 0
        self._listening = None
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
        checked = float("-inf")
        while not self._stopping.is_set():
            try:
                close_old_connections()
                if time.monotonic() - checked > CLOCK_SECONDS:
                    Delivery.objects.mistrust_clock()
                    checked = time.monotonic()
                self._wait()
            except DatabaseError as error:
                self._report_down("database", error)
                connection.close()
                self._stopping.wait(min(settings.RELAY_POLL_SECONDS, 1))
            self._wake.release()
            now = time.monotonic()
            if all(now - each.seen_alive < STUCK_SECONDS for each in self._publishers):
                systemd.notify("WATCHDOG=1")
        systemd.notify("STOPPING=1")
        self._end(threads)
        connection.close()

    def _wait(self) -> None:
        """Until an email is stored, or for a poll's time."""
        seconds = min(settings.RELAY_POLL_SECONDS, 10)
        if connection.vendor != "postgresql":
            self._stopping.wait(seconds)
            return
        connection.ensure_connection()
        if self._listening is not connection.connection:
            with connection.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
            self._listening = connection.connection
        deadline = time.monotonic() + seconds
        while not self._stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            # The driver's own connection raises the driver's own errors.
            with connection.wrap_database_errors:
                told = list(self._listening.notifies(timeout=min(left, 0.5), stop_after=1))
                if told:
                    # What comes after this may stand for emails that the next look doesn't see yet.
                    list(self._listening.notifies(timeout=0))
                    self._stopping.wait(SETTLE_SECONDS)
                    return

    def _publish(self, publisher: Publisher) -> None:
        pause = 0.5
        while not self._stopping.is_set():
            publisher.seen_alive = time.monotonic()
            try:
                close_old_connections()
                found = publisher.publish_due()
            except DatabaseError as error:
                self._report_down("database", error)
                connection.close()
            except Exception as error:  # of the many kinds that the AMQP client raises
                self._report_down("broker", error)
                with suppress(DatabaseError):
                    Tally.add("publish_failures")
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
        """Gives publishers a second to come back from the broker, then gives their rows back."""
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
                logger.warning("the %s doesn't answer, emails wait: %s", what, error)

    def _report_up(self) -> None:
        with self._lock:
            if self._down:
                self._down = False
                logger.info("publishing again")
