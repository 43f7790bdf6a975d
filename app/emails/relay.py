import logging
import threading

from django.conf import settings
from django.db import Error as DatabaseError
from django.db import close_old_connections

from emails.models import Delivery
from emails.tasks import deliver
from mailroom.celery import app

logger = logging.getLogger(__name__)

BATCH = 200
LONGEST_PAUSE = 5  # seconds between tries while the broker or the database is down
CONFIRM_TIMEOUT = 5  # seconds


class Stopped(BaseException):
    """Raised by a signal handler to leave a publish that waits for the broker."""


class Relay:
    """Publishes due deliveries. The rows are the truth, so it may crash or run twice at any time.

    `run` returns after `stop`, which may be called from a signal handler of the same thread.
    """

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._publishing = False
        self._connection = None
        self._down = False

    def stop(self) -> None:
        self._stopping.set()
        if self._publishing:
            raise Stopped

    def run(self) -> None:
        pause = settings.RELAY_POLL_SECONDS
        while not self._stopping.is_set():
            close_old_connections()
            try:
                found = self.run_once()
            except DatabaseError as error:
                self._report_down("database", error)
            except Stopped:
                break
            except Exception as error:  # of the many kinds that the AMQP client raises
                self._report_down("broker", error)
            else:
                if self._down:
                    self._down = False
                    logger.info("publishing again")
                pause = settings.RELAY_POLL_SECONDS
                if found == BATCH:
                    continue
            self._stopping.wait(pause)
            if self._down:
                pause = min(pause * 2, LONGEST_PAUSE)
        self._discard_connection()

    def run_once(self) -> int:
        """Publishes up to BATCH due deliveries, the oldest first; returns how many it found.

        Raises what the broker's client raises, with the delivery concerned due again.
        """
        due = list(Delivery.objects.due().values_list("pk", "email_id")[:BATCH])
        for delivery_id, email_id in due:
            if self._stopping.is_set():
                break
            until = Delivery.objects.lease(delivery_id)
            if until is None:
                continue
            try:
                self._publish(delivery_id)
            except BaseException:
                self._discard_connection()
                Delivery.objects.release(delivery_id, until)
                raise
            logger.debug("delivery %s published", delivery_id, extra={"email_id": email_id})
        return len(due)

    def _publish(self, delivery_id: int) -> None:
        """Returns once the broker has the message in a queue; takes seconds at the very most."""
        self._publishing = True
        try:
            if self._connection is None:
                self._connection = app.connection_for_write()
            deliver.apply_async(
                (delivery_id,),
                producer=app.amqp.Producer(self._connection),
                mandatory=True,
                confirm_timeout=CONFIRM_TIMEOUT,
                retry=False,
            )
        finally:
            self._publishing = False

    def _discard_connection(self) -> None:
        """Drops the connection without a farewell: a broker that is stuck wouldn't answer it."""
        if self._connection is not None:
            self._connection.collect()
            self._connection = None

    def _report_down(self, what: str, error: Exception) -> None:
        if not self._down:
            self._down = True
            logger.warning("the %s doesn't answer, emails wait: %s", what, error)
