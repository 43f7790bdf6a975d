import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from celery import Task, shared_task
from celery.exceptions import Reject
from celery.utils import uuid
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.db.models import Exists, OuterRef
from django.utils import timezone

from emails import context, services, smtp
from emails.models import UNFINISHED, Delivery, Email, State, after_uncertain, retry_delay

logger = logging.getLogger(__name__)

PURGE_BATCH = 500
PURGE_BATCHES = 20
# Seconds between tries to reach a database that is being restarted.
DATABASE_PAUSES = (0.2, 0.5, 1, 2, 3, 5, 5, 5, 5)


class StoredTask(Task):
    """A task whose call is stored, in the caller's transaction, instead of published."""

    def apply_async(self, args=None, kwargs=None, task_id=None, producer=None, **options):
        if options:
            raise TypeError(f"{self.name} takes no {', '.join(options)}: a row has no such thing")
        email = store(task_id or uuid(), *(args or ()), **(kwargs or {}))
        return self.AsyncResult(str(email.pk))


@shared_task(base=StoredTask, bind=True)
def send_email(self, title, content, from_, to, html_content=None) -> str:
    """Sends an email, to one address or to several. The result's id is the email's.

    `send_email.delay(…)` only writes a row, as part of the caller's transaction: no broker is
    needed, and neither text nor address is in a message. It comes here if it is called as a
    function, or by a message from a project that knows nothing but the task's name.
    """
    key = self.request.id
    return str(persistently(lambda: store(key, title, content, from_, to, html_content)).pk)


def store(key: str | None, title, content, from_, to, html_content=None) -> Email:
    return services.accept(
        None,
        subject=title,
        text=content,
        html=html_content or "",
        sender=from_ or "",
        recipients=[to] if isinstance(to, str) else list(to),
        show_recipients=True,
        idempotency_key=key,
    )


def persistently(act: Callable):
    """Does it, again and again while the database is away: half a minute at most."""
    for pause in (*DATABASE_PAUSES, None):
        try:
            return act()
        except (DatabaseError, InterfaceError) as error:
            if pause is None or connection.in_atomic_block:
                raise
            logger.warning("the database doesn't answer: %s", type(error).__name__)
            connection.close()
            time.sleep(pause)


@shared_task
def deliver(*delivery_ids: int) -> None:
    """Sends one email to one recipient, if the delivery is still waiting for that; or several.

    The message is only a doorbell: it may come twice, late or for a row that is gone. Retries are
    the relay's business, by `due_at`. What doesn't fit into a part of the task's time goes back.
    """
    until = time.monotonic() + settings.CELERY_TASK_TIME_LIMIT / 4
    for position, delivery_id in enumerate(delivery_ids):
        if position and time.monotonic() > until:
            return give_back(delivery_ids[position:])
        deliver_one(delivery_id)


def give_back(delivery_ids: Sequence[int]) -> None:
    persistently(lambda: Delivery.objects.give_back(delivery_ids))
    logger.info("%s deliveries given back, the server is slow", len(delivery_ids))


def deliver_one(delivery_id: int) -> None:
    try:
        delivery = persistently(lambda: Delivery.objects.claim(delivery_id))
    except DatabaseError as error:
        raise Reject(type(error).__name__, requeue=True) from None
    if delivery is None:
        logger.info("delivery %s isn't waiting to be sent, skipped", delivery_id)
        return
    email = delivery.email
    with context.bind(
        request_id=email.request_id, email_id=delivery.email_id, delivery_id=delivery.pk
    ):
        attempt(delivery)


def attempt(delivery: Delivery) -> None:
    started = time.monotonic()
    try:
        outcome = smtp.send(delivery)
    except smtp.LeaseLost:
        logger.warning("attempt %s stopped: the lease was lost", delivery.attempts)
        return
    state, due_at = outcome.state, None
    if state == State.DEFERRED:
        due_at = timezone.now() + retry_delay(delivery.attempts)
        if due_at > delivery.deadline:
            state, due_at = State.FAILED, None
    elif state == State.UNCERTAIN:
        due_at = after_uncertain(delivery.attempts)
        if due_at and due_at > delivery.deadline:
            due_at = None
    seconds = time.monotonic() - started
    recorded = persistently(
        lambda: delivery.record(
            state, code=outcome.code, answer=outcome.answer, seconds=seconds, due_at=due_at
        )
    )
    logger.log(
        logging.INFO if state == State.SENT else logging.WARNING,
        "%s after attempt %s, SMTP code %s%s",
        state,
        delivery.attempts,
        outcome.code,
        "" if recorded else ", not recorded: the lease was lost",
    )


@shared_task
def purge() -> None:
    """Deletes emails that are finished and older than RETENTION_DAYS.

    In small transactions, so that nobody waits long for the database; the rest at the next run.
    """
    oldest_kept = timezone.now() - timedelta(days=settings.RETENTION_DAYS)
    waiting = Delivery.objects.filter(
        email=OuterRef("pk"), state__in=UNFINISHED, due_at__isnull=False
    )
    finished = Email.objects.filter(~Exists(waiting), created_at__lt=oldest_kept)
    deleted = 0
    for _ in range(PURGE_BATCHES):
        batch = list(finished.order_by("created_at").values_list("pk", flat=True)[:PURGE_BATCH])
        Email.objects.filter(pk__in=batch).delete()
        deleted += len(batch)
        if len(batch) < PURGE_BATCH:
            break
    logger.info(
        "purged %s emails created before %s", deleted, oldest_kept.isoformat("T", "minutes")
    )
