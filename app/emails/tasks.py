"""The Celery tasks. Their options are set here, not in the project's settings."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from celery import Task, shared_task
from celery.exceptions import Reject
from celery.utils import uuid
from django.db import Error as DatabaseError
from django.db.models import Exists, OuterRef
from django.utils import timezone

from emails import delivering, services
from emails.conf import conf
from emails.models import Delivery, Email
from emails.queues import MAINTENANCE_QUEUE
from emails.states import UNFINISHED

logger = logging.getLogger(__name__)

PURGE_BATCH = 500
PURGE_BATCHES = 20

# A message is acknowledged after its task. Duplicate messages are harmless, because a worker claims
# the row first. The row contains the result.
OPTIONS: dict[str, Any] = {
    "acks_late": True,
    "reject_on_worker_lost": True,
    "ignore_result": True,
    "serializer": "json",
}


@contextmanager
def requeued_without_database() -> Iterator[None]:
    """Requeues the message if the database is down. By default, Celery would acknowledge it."""
    try:
        yield
    except DatabaseError as error:
        raise Reject(type(error).__name__, requeue=True) from None


class StoredTask(Task):  # type: ignore[misc]
    """A task whose call is stored in the caller's transaction, not published."""

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        task_id: str | None = None,
        producer: Any = None,
        **options: Any,
    ) -> Any:
        if options:
            raise TypeError(f"{self.name} takes no {', '.join(options)}: calls are stored")
        email = store(task_id or uuid(), *(args or ()), **(kwargs or {}))
        return self.AsyncResult(str(email.pk))


class MaintenanceTask(Task):  # type: ignore[misc]
    """A task that is published to the maintenance queue, regardless of the project's routes."""

    def apply_async(self, *args: Any, **options: Any) -> Any:
        # Workers declare the queue. Beat's broker user may only publish.
        return super().apply_async(*args, **{"queue": MAINTENANCE_QUEUE, "declare": []} | options)


@shared_task(base=StoredTask, bind=True, **OPTIONS)  # type: ignore[untyped-decorator]
def send_email(
    self: Any,
    title: str,
    content: str,
    from_: str | None,
    to: str | Sequence[str],
    html_content: str | None = None,
) -> str:
    """Sends an email to one or several addresses. The result has the id of the email.

    `send_email.delay(…)` only writes rows in the caller's transaction. It needs no broker, and no
    message has the text or an address. A worker runs this body if another project publishes the
    task by its name.
    """
    key = self.request.id
    with requeued_without_database():
        accepted = delivering.retry_while_database_down(
            lambda: store(key, title, content, from_, to, html_content)
        )
    return str(accepted.pk)


def store(
    key: str | None,
    title: str,
    content: str,
    from_: str | None,
    to: str | Sequence[str],
    html_content: str | None = None,
) -> Email:
    message = services.Message(
        subject=title,
        text=content,
        html=html_content or "",
        sender=from_ or "",
        recipients=[to] if isinstance(to, str) else list(to),
        show_recipients=True,
    )
    return services.accept(None, message, idempotency_key=key)


@shared_task(**OPTIONS)  # type: ignore[untyped-decorator]
def deliver(*delivery_ids: int) -> None:
    """Sends queued deliveries. The message may be a duplicate, late, or for deleted rows."""
    with requeued_without_database():
        delivering.deliver(delivery_ids)


@shared_task(base=MaintenanceTask, **OPTIONS)  # type: ignore[untyped-decorator]
def purge() -> None:
    """Deletes finished emails that are older than EMAILS_RETENTION_DAYS.

    Each transaction is small, so that other transactions do not wait long. The next run deletes the
    rest.
    """
    oldest_kept = timezone.now() - timedelta(days=conf.RETENTION_DAYS)
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
