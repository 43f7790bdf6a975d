"""The relay process: runs several publishers, resets impossible due times and merges counters."""

import logging
import threading
import time
from contextlib import suppress
from typing import Any

from django.db import Error as DatabaseError
from django.db import close_old_connections, connection

from emails import deliveries, systemd
from emails.conf import conf
from emails.publisher import BATCH, REPAIR_SECONDS, Publisher
from emails.queries import execute, load
from emails.services import CHANNEL, NOTIFY_SECONDS

logger = logging.getLogger(__name__)

SQL = load("emails.sql")
LONGEST_PAUSE = 5  # seconds between attempts while the broker or the database is down
STUCK_SECONDS = 120  # longer than any wait of a publisher for the broker or the database
NOTIFY_SETTLE_SECONDS = 2 * NOTIFY_SECONDS


class Relay:
    """Wakes its publishers when an email is stored, and at least every RELAY_POLL_SECONDS.

    `run` returns after `stop`, which a signal handler of the same thread may call.
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
        """Waits until an email is stored or RELAY_POLL_SECONDS have passed."""
        connection.ensure_connection()
        if self._listening is not connection.connection:
            with connection.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
            self._listening = connection.connection
        deadline = time.monotonic() + min(conf.RELAY_POLL_SECONDS, 10)
        while not self._stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            # This uses psycopg's connection directly, so Django must translate psycopg's errors.
            with connection.wrap_database_errors:
                notifications = list(self._listening.notifies(timeout=min(left, 0.5), stop_after=1))
                if notifications:
                    # Only notifications before the wait are discarded. The next query may miss the
                    # emails of a later notification, which must cause another query.
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
            except Exception as error:  # the AMQP client raises many types
                self._report_down("broker", error)
                with suppress(DatabaseError), execute(SQL["count"], ("publish_failures", 1)):
                    pass
            else:
                pause = 0.5
                if found:
                    self._report_up()
                if found == BATCH:
                    self._wake.release()  # more may be due, so wake another publisher
                    continue
                self._wake.acquire(timeout=LONGEST_PAUSE)
                continue
            self._stopping.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        publisher.discard_connection()
        connection.close()

    def _end(self, threads: list[threading.Thread]) -> None:
        """Waits a second for the publishers, then releases the leases of those still running."""
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
