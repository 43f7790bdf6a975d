import logging
from datetime import timedelta

from celery import shared_task
from django.conf import settings
from django.utils import timezone

from emails import smtp
from emails.models import UNFINISHED, Delivery, Email, State

logger = logging.getLogger(__name__)

DEADLINE = timedelta(hours=24)
PURGE_BATCH = 500
PURGE_BATCHES = 20


@shared_task
def deliver(delivery_id: int) -> None:
    """Sends one email to one recipient, if the delivery is still waiting for that.

    The message is only a doorbell: it may come twice, late or for a row that is gone. Retries are
    the relay's business, by `next_attempt_at`.
    """
    delivery = Delivery.objects.claim(delivery_id)
    if delivery is None:
        logger.info("delivery %s isn't waiting to be sent, skipped", delivery_id)
        return
    refused = smtp.send(delivery)
    now = timezone.now()
    if refused is None:
        state = State.SENT
        values = {"sent_at": now, "last_smtp_code": 250, "last_error": ""}
    else:
        next_attempt_at = now + smtp.retry_delay(delivery.attempts)
        given_up = refused.permanent or next_attempt_at > delivery.email.created_at + DEADLINE
        state = State.FAILED if given_up else State.DEFERRED
        values = {
            "next_attempt_at": next_attempt_at,
            "last_smtp_code": refused.code,
            "last_error": refused.reason[:500],
        }
    recorded = delivery.record(state, **values)
    logger.log(
        logging.INFO if state == State.SENT else logging.WARNING,
        "delivery %s %s after attempt %s, SMTP code %s%s",
        delivery.pk,
        state,
        delivery.attempts,
        values["last_smtp_code"],
        "" if recorded else ", not recorded: the lease was lost",
        extra={"email_id": delivery.email_id},
    )


@shared_task
def purge() -> None:
    """Deletes emails that are finished and older than RETENTION_DAYS.

    In small transactions, so that nobody waits long for the database; the rest at the next run.
    """
    oldest_kept = timezone.now() - timedelta(days=settings.RETENTION_DAYS)
    finished = Email.objects.filter(created_at__lt=oldest_kept).exclude(
        deliveries__state__in=UNFINISHED
    )
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
