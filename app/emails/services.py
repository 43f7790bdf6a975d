"""Accepts, retries and cancels emails. Callers are the API, the web page, the task, the backend."""

import hmac
import json
import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import DatabaseError, connection, transaction
from django.db.models import QuerySet

from emails import deliveries, hourly_limit
from emails.conf import conf
from emails.drafts import Draft, Message, prepare
from emails.hourly_limit import OverLimit, Remaining
from emails.models import Delivery, Email
from emails.queries import execute, fetch, load

__all__ = [
    "CHANNEL",
    "NOTIFY_SECONDS",
    "Conflict",
    "Message",
    "OverLimit",
    "accept",
    "accept_batch",
    "cancel",
    "replay",
]

logger = logging.getLogger(__name__)

SQL = load("emails.sql")
CHANNEL = "emails_due"
# A process sends at most one NOTIFY within this time. After a NOTIFY, the relay waits twice as long
# before it queries. So the query finds emails that were stored after the NOTIFY.
NOTIFY_SECONDS = 0.01

_notified_at = float("-inf")


class Conflict(Exception):
    """The idempotency key was used with other content."""


def accept(owner: Any, message: Message, idempotency_key: str | None = None) -> Email:
    """Stores an email and its deliveries in one transaction; a worker sends it later.

    Without `owner`, the email is the project's own, which may have any sender. Raises
    ValidationError with messages by API field, Conflict, or OverLimit. Returns the earlier email
    if one has the same key and content.
    """
    draft = prepare(owner, message, idempotency_key)
    limit = hourly_limit.limit_of(owner)
    # Without a limit, there is only one statement, so it needs no transaction.
    with nullcontext() if limit is None else transaction.atomic():
        if limit is not None:
            hourly_limit.lock(owner)
            Remaining(owner, limit).check(draft.email, len(draft.kinds))
        email = store_once(draft)
        if email is draft.email:
            transaction.on_commit(notify_relay)
    if email is draft.email:
        log_accepted(draft)
    return email


def accept_batch(
    owner: Any, batch: Iterable[tuple[Message, str | None]]
) -> list[Email | ValidationError | Conflict | OverLimit]:
    """Stores an owner's emails, each with an idempotency key or None, in one transaction.

    Returns an email or an error for each. An error doesn't stop the others.
    """
    results: list[Email | ValidationError | Conflict | OverLimit] = []
    new: list[Draft] = []
    with transaction.atomic():
        # Without the lock, two batches with the same keys in a different order could deadlock.
        hourly_limit.lock(owner)
        limit = hourly_limit.limit_of(owner)
        remaining = None if limit is None else Remaining(owner, limit)
        for message, key in batch:
            try:
                draft = prepare(owner, message, key)
                if remaining:
                    remaining.check(draft.email, len(draft.kinds))
                email = store_once(draft)
            except (ValidationError, Conflict, OverLimit) as error:
                results.append(error)
                continue
            results.append(email)
            if email is draft.email:
                new.append(draft)
                if remaining:
                    remaining.recipients -= len(draft.kinds)
        if new:
            transaction.on_commit(notify_relay)
    for draft in new:
        log_accepted(draft)
    return results


def store_once(draft: Draft) -> Email:
    """Stores the email, or returns the earlier email with the same key."""
    email, kinds = draft.email, draft.kinds
    stored, suppressed = store(draft)
    if stored:
        return email
    first = None
    if key := email.idempotency_key:
        first = Email.objects.filter(owner=email.owner, idempotency_key=key).first()
    if first is None:
        errors: dict[str, list[str]] = {}
        for address, kind in kinds.items():
            if address.lower() in suppressed:
                errors.setdefault(kind, []).append(f"{address} is suppressed")
        raise ValidationError(errors)
    if not hmac.compare_digest(first.digest, email.digest):
        raise Conflict
    return first


def log_accepted(draft: Draft) -> None:
    email_id = {"email_id": draft.email.pk}
    logger.info("accepted for %s recipients", len(draft.kinds), extra=email_id)


def store(draft: Draft) -> tuple[bool, list[str]]:
    """Stores the email unless it is refused.

    Returns whether it was stored, and the suppressed recipients.
    """
    email, message, kinds = draft.email, draft.message, draft.kinds
    addresses = [address.lower() for address in kinds]
    values = {
        "id": email.pk,
        "owner": email.owner_id,
        "sender": email.sender,
        "subject": email.subject,
        "text": email.text,
        "html": email.html,
        "reply_to": json.dumps(email.reply_to),
        "headers": json.dumps(email.headers),
        "show_recipients": email.show_recipients,
        "key": email.idempotency_key,
        "digest": email.digest,
        "request_id": email.request_id,
        "recipients": list(kinds),
        "addresses": addresses,
        "domains": [address.rpartition("@")[2] for address in addresses],
        "kinds": list(kinds.values()),
        "filenames": [file.filename for file in message.attachments],
        "content_types": [file.content_type for file in message.attachments],
        "contents": [file.content for file in message.attachments],
        "content_ids": [file.content_id for file in message.attachments],
        "send_at": message.send_at,
        "deadline": message.deadline,
        "lifetime": timedelta(seconds=conf.DEADLINE_SECONDS),
        # The project's own code would not handle a refusal.
        "skip_suppressed": message.skip_suppressed or email.owner_id is None,
        "count": len(kinds),
    }
    primary_key: Any = get_user_model()._meta.pk
    key_type = primary_key.rel_db_type(connection)
    ((stored, suppressed),) = fetch(SQL["store"].format(owner_type=key_type), values)
    return stored, suppressed


def notify_relay() -> None:
    """Wakes the relay, so that new emails do not wait for its next poll."""
    global _notified_at
    if time.monotonic() < _notified_at + NOTIFY_SECONDS:
        return
    _notified_at = time.monotonic()
    try:
        with execute(SQL["notify"]):
            pass
    except DatabaseError as error:  # the email is stored; the relay's next poll finds it
        logger.warning("the relay was not notified: %s", type(error).__name__)


def replay(chosen: QuerySet[Delivery]) -> int:
    """Queues these deliveries again if they are failed or held; returns their number."""
    count = deliveries.replay(list(chosen.order_by().values_list("pk", flat=True)))
    transaction.on_commit(notify_relay)
    return count


def cancel(chosen: QuerySet[Delivery]) -> int:
    """Cancels the deliveries that no worker has started to send; returns their number."""
    return deliveries.cancel(list(chosen.order_by().values_list("pk", flat=True)))
