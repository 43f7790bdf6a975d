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
# While more than a batch is due. A message with one id costs as much as one with twenty.
DELIVERIES_PER_MESSAGE = 20
CONFIRM_TIMEOUT = 5  # seconds
PUBLISHING_SECONDS = 15  # for one batch; what is left then is released
IDLE_SECONDS = 15  # the broker closes a connection that is silent for two heartbeats
REPAIR_SECONDS = 15  # between looks for lost publications, and for what was committed late
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
