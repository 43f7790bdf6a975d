"""Publishes due deliveries to RabbitMQ."""

import logging
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from emails import context, deliveries
from emails.deliveries import BEGINNING_OF_TIME
from emails.delivery_records import Lease, Leased
from emails.queues import MAIL_QUEUE
from emails.tasks import deliver

logger = logging.getLogger(__name__)

BATCH = 100
# Ids per message while more than a batch is due. 20 ids cost as much as a single id.
DELIVERIES_PER_MESSAGE = 20
CONFIRM_TIMEOUT = 5  # seconds
PUBLISHING_SECONDS = 15  # for one batch; then its unpublished deliveries are released
IDLE_SECONDS = 15  # the broker closes a connection that misses two heartbeats
REPAIR_SECONDS = 15  # between searches for lost publications and for late commits
# A transaction that started this long ago may still commit deliveries that were due then.
FLOOR_MARGIN = timedelta(seconds=10)


class Publisher:
    """Publishes due deliveries over its own broker connection.

    All state is in the rows, so publishers can crash at any time and run in parallel.
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
        """Publishes up to BATCH due deliveries, the oldest first; returns how many were due.

        Raises the broker client's errors. The unpublished deliveries are then due again.
        """
        floor = self._next_floor()
        if not deliveries.is_due(floor):
            return 0
        # The publisher connects before it leases, so that nothing is leased while the broker is
        # down.
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
        """Ends the leases of unpublished deliveries."""
        held, self._held = self._held, Lease()
        deliveries.release(held)

    def requeue_lost(self) -> None:
        """Makes deliveries due again whose message RabbitMQ confirmed and lost."""
        self._repaired = time.monotonic()
        if not deliveries.is_waiting_for_worker():
            return
        self._connect()
        queue = MAIL_QUEUE.bind(self._connection.default_channel)
        waiting = queue.queue_declare(passive=True).message_count
        self._used = time.monotonic()
        if count := deliveries.requeue_lost(queue_is_empty=waiting == 0):
            logger.warning("%s publications were lost and will be published again", count)

    @property
    def repair_is_due(self) -> bool:
        return time.monotonic() - self._repaired > REPAIR_SECONDS

    def _next_floor(self) -> datetime:
        """The due time at which a search for due deliveries starts.

        While an old transaction is open, vacuum can't remove index entries of finished deliveries.
        A search from the floor skips these entries. Every REPAIR_SECONDS, the search covers
        everything, because some deliveries may have been committed late.
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
        """Publishes a message, and waits at most a few seconds until the broker has queued it."""
        ids = {}
        if len(leased) == 1:
            ids = {"request_id": leased[0].request_id, "email_id": str(leased[0].email_id)}
        deliver.apply_async(
            [each.id for each in leased],
            producer=deliver.app.amqp.Producer(self._connection),
            queue=MAIL_QUEUE,
            # Workers declare the queue. The relay's broker user may only publish.
            declare=[],
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
        """Closes only the socket, because a stuck broker would not answer AMQP's close method."""
        if self._connection is not None:
            self._connection.collect()
            self._connection = None
