"""A worker handles one queue message: it claims, sends and records deliveries."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from django.db import DatabaseError, InterfaceError, connection

from emails import context, deliveries, messages, slots, smtp
from emails.conf import conf
from emails.delivery_records import Claimed, Ended
from emails.smtp_replies import Result
from emails.states import State

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds between attempts to reach the database, for example while it restarts.
DATABASE_PAUSES = (0.2, 0.5, 1, 2, 3, 5, 5, 5, 5)
# The time in which a worker should send a chunk of emails. A fast server gets large chunks, a slow
# server gets single emails. With small chunks, few emails become uncertain when a worker dies.
CHUNK_SECONDS = 0.25
LARGEST_CHUNK = 20


def retry_while_database_down(act: Callable[[], T]) -> T:
    """Calls `act`, and retries for up to half a minute while the database is unavailable."""
    for pause in DATABASE_PAUSES:
        try:
            return act()
        except (DatabaseError, InterfaceError) as error:
            if connection.in_atomic_block:
                raise
            logger.warning("the database is unavailable: %s", type(error).__name__)
            connection.close()
            time.sleep(pause)
    return act()


class Sender:
    """Sends the deliveries of one message in chunks.

    One statement records the ended attempts and begins the next ones. With a fast server, several
    emails share a durable commit. With a slow server, each email has its own commit.
    """

    # Seconds that the last email of this process took. The size of the next chunk depends on it.
    pace = float("inf")

    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self.begun: set[int] = set()
        self.built: dict[int, smtp.Envelope | Result] = {}

    def send(self, ids: Sequence[int]) -> None:
        """Sends the queued deliveries. Requeues those that are left after a fifth of the lease."""
        end = time.monotonic() + conf.SENDING_LEASE_SECONDS / 5
        rest = deque(ids)
        first = True
        while rest and (first or time.monotonic() < end):
            chunk = [rest.popleft() for _ in range(min(self.chunk_size(), len(rest)))]
            claimed = retry_while_database_down(lambda ids=chunk: deliveries.claim(ids))  # type: ignore[misc]
            if len(claimed) < len(chunk):
                logger.info("%s deliveries are not queued, skipped", len(chunk) - len(claimed))
            while claimed and (first or time.monotonic() < end):
                self.attempt(claimed)
                claimed.pop(0)
                first = False
            if claimed:
                smtp.close()  # the server may already have the next envelope
                retry_while_database_down(lambda left=claimed: deliveries.unclaim(left))  # type: ignore[misc]
                rest.extend(each.id for each in claimed)
        self.flush()
        if rest:
            retry_while_database_down(lambda: deliveries.requeue(list(rest)))
            logger.info("%s deliveries requeued, the mail server is slow", len(rest))

    @classmethod
    def chunk_size(cls) -> int:
        # An uncertain delivery waits for an operator, so only the delivery being sent may become
        # uncertain.
        if conf.UNCERTAIN_POLICY == "hold" or cls.pace <= 0:
            return 1
        return max(1, min(int(CHUNK_SECONDS / cls.pace), LARGEST_CHUNK))

    def attempt(self, claimed: Sequence[Claimed]) -> None:
        """Sends the first of these deliveries. The caller calls it again for the others."""
        delivery, started = claimed[0], time.monotonic()
        ids = {"request_id": delivery.request_id, "email_id": delivery.email_id}
        with context.bind(**ids, delivery_id=delivery.id):
            try:
                result = self.result(claimed)
            except smtp.LeaseLost:
                logger.warning("attempt %s stopped: the lease was lost", delivery.number)
                return
            seconds = time.monotonic() - started
            type(self).pace = seconds if result.state == State.SENT else float("inf")
            left = delivery.seconds_left - seconds
            step = deliveries.following(result.state, attempts=delivery.number, seconds_left=left)
            ended = (delivery.number, step, result.code, result.answer, seconds)
            self.ended.append(Ended(delivery.id, *ended, suppress=result.no_such_recipient))
            logger.log(
                logging.INFO if step.state == State.SENT else logging.WARNING,
                "%s after attempt %s, SMTP code %s",
                step.state,
                delivery.number,
                result.code,
            )
            if self.chunk_size() == 1:
                self.flush()

    def result(self, claimed: Sequence[Claimed]) -> Result:
        envelope = self.built.pop(claimed[0].id, None) or self.build(claimed[0])
        if isinstance(envelope, Result):
            return envelope
        upcoming = None
        if len(claimed) > 1:
            built = self.built[claimed[1].id] = self.build(claimed[1])
            upcoming = built if isinstance(built, smtp.Envelope) else None
        return smtp.send(envelope, lambda: self.begin(claimed), upcoming)

    def build(self, delivery: Claimed) -> smtp.Envelope | Result:
        """The envelope to send, or the result if the message can't be built."""
        try:
            message = messages.build(delivery)
            content = messages.as_bytes(message)
        except (DatabaseError, InterfaceError) as error:
            return Result(State.DEFERRED, None, type(error).__name__)
        except Exception as error:  # retries would fail too
            return Result(State.FAILED, None, f"{type(error).__name__}: {error}")
        return smtp.Envelope(delivery.sender, delivery.recipient, content, message)

    def begin(self, claimed: Sequence[Claimed]) -> bool:
        """Marks the first of these deliveries, and the rest of its chunk, as about to be sent."""
        if claimed[0].id not in self.begun:
            following = claimed[: self.chunk_size()]
            _, begun = deliveries.record(self.ended, following)
            self.ended, self.begun = [], begun
        return claimed[0].id in self.begun

    def flush(self) -> None:
        """Records the ended attempts."""
        if not self.ended:
            return
        done, _ = retry_while_database_down(lambda: deliveries.record(self.ended))
        for each in self.ended:
            if each.id not in done:
                logger.warning("delivery %s: outcome not recorded, the lease was lost", each.id)
        self.ended = []


def deliver(ids: Sequence[int]) -> None:
    """Sends the deliveries of a message, or requeues them if no SMTP connection is free."""
    with slots.smtp_slot(patience=conf.SENDING_LEASE_SECONDS / 5) as free:
        if free:
            Sender().send(ids)
            return
    retry_while_database_down(lambda: deliveries.requeue(ids))
    logger.info("%s deliveries requeued, no SMTP connection is free", len(ids))
