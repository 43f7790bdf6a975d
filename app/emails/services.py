"""What the API, the page, the task and the email backend call: accept, find, retry, cancel."""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import DatabaseError, connection, transaction
from django.db.models import QuerySet
from django.utils import timezone

from emails import context, deliveries, validation
from emails.conf import conf
from emails.models import ApiKey, Delivery, Email, SendingLimits
from emails.queries import execute, fetch, load
from emails.validation import File

logger = logging.getLogger(__name__)

SQL = load("emails.sql")
CHANNEL = "emails_due"
# A process sends at most one NOTIFY in so many seconds. The relay waits twice as long after a
# NOTIFY before it queries, so it sees what was stored meanwhile.
NOTIFY_SECONDS = 0.01

_notified_at = float("-inf")


class Conflict(Exception):
    """The idempotency key belongs to an email with other content."""


class OverLimit(Exception):
    """The owner has sent to as many recipients as it may within an hour."""


@dataclass
class Message:
    """An email as it is submitted. An empty `sender` stands for DEFAULT_FROM_EMAIL."""

    subject: str
    text: str
    recipients: Sequence[str] = ()
    cc: Sequence[str] = ()
    bcc: Sequence[str] = ()
    reply_to: Sequence[str] = ()
    sender: str = ""
    html: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    attachments: Sequence[File] = ()
    send_at: datetime | None = None
    deadline: datetime | None = None
    show_recipients: bool = False
    skip_suppressed: bool = False

    def kinds(self) -> dict[str, str]:
        """Each recipient and how it is named: to, cc or bcc."""
        kinds: dict[str, str] = {}
        addresses = (self.recipients, self.cc, self.bcc)
        for kind, named in zip(Delivery.Kind, addresses, strict=True):
            for address in named:
                kinds.setdefault(address, kind.value)
        return kinds


def accept(owner: Any, message: Message, idempotency_key: str | None = None) -> Email:
    """Stores an email and its deliveries in one transaction; a worker sends it later.

    Without `owner` it is the project's own email, which may have any sender. Raises
    ValidationError with the messages by field, the fields named as in the API; Conflict; or
    OverLimit. With the key and the content of an earlier email it returns that one.
    """
    limits = getattr(owner, "sending_limits", None)
    message.sender = message.sender or settings.DEFAULT_FROM_EMAIL
    kinds = message.kinds()
    check(owner, message, kinds, limits, idempotency_key)
    email = Email(
        owner=owner,
        sender=message.sender,
        subject=message.subject,
        text=message.text,
        html=message.html,
        reply_to=list(message.reply_to),
        headers=dict(message.headers),
        show_recipients=message.show_recipients or bool(message.cc),
        idempotency_key=idempotency_key,
        request_id=context.get("request_id"),
    )
    if idempotency_key:
        email.digest = digest(email, kinds, message)
    limit = hourly_limit(owner, limits)
    # One statement needs no transaction.
    with nullcontext() if limit is None else transaction.atomic():
        if limit is not None:
            check_limit(owner, limit, len(kinds), email)
        stored, suppressed = store(email, kinds, message)
        if not stored:
            first = Email.objects.filter(owner=owner, idempotency_key=idempotency_key).first()
            if not idempotency_key or first is None:
                raise ValidationError({"to": [f"{each} is suppressed" for each in suppressed]})
            if not hmac.compare_digest(first.digest, email.digest):
                raise Conflict
            return first
        transaction.on_commit(notify_relay)
    logger.info("accepted for %s recipients", len(kinds), extra={"email_id": email.pk})
    return email


def check(
    owner: Any,
    message: Message,
    kinds: Mapping[str, str],
    limits: SendingLimits | None,
    key: str | None,
) -> None:
    """Raises ValidationError with all that is wrong, by field."""
    v = validation
    body = v.check_body if owner or not message.html else v.check_storable
    checks: dict[str, Any] = {
        "subject": lambda: v.check_subject(message.subject),
        "text": lambda: body(message.text),
        "html": lambda: v.check_storable(message.html),
        "from": lambda: v.check_sender(message.sender, owner, limits),
        "to": lambda: v.check_recipients(message.recipients, kinds),
        "cc": lambda: v.check_addresses(message.cc),
        "bcc": lambda: v.check_addresses(message.bcc),
        "reply_to": lambda: v.check_reply_to(message.reply_to),
        "headers": lambda: v.check_headers(message.headers),
        "attachments": lambda: v.check_attachments(message.attachments, message.text, message.html),
        "send_at": lambda: v.check_time(message.send_at),
        "deadline": lambda: v.check_time(message.deadline, after=message.send_at),
        "idempotency_key": lambda: v.check_key(key),
    }
    errors = {}
    for name, run in checks.items():
        try:
            run()
        except ValidationError as error:
            errors[name] = error
    if errors:
        raise ValidationError(errors)


def store(email: Email, kinds: Mapping[str, str], message: Message) -> tuple[bool, list[str]]:
    """Whether the email was stored, and which of its recipients are suppressed."""
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
        "skip_suppressed": message.skip_suppressed,
        "count": len(kinds),
    }
    key_type = get_user_model()._meta.pk.rel_db_type(connection)
    ((stored, suppressed),) = fetch(SQL["store"].format(owner_type=key_type), values)
    return stored, suppressed


def digest(email: Email, kinds: Mapping[str, str], message: Message) -> str:
    content = [
        *(email.sender, email.subject, email.text, email.html, email.reply_to, email.headers),
        *(email.show_recipients, kinds, message.skip_suppressed),
        *(time.isoformat() if time else None for time in (message.deadline, message.send_at)),
        [
            (each.filename, each.content_type, hashlib.sha256(each.content).hexdigest())
            for each in message.attachments
        ],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hourly_limit(owner: Any, limits: SendingLimits | None) -> int | None:
    """How many recipients the owner may have within an hour; None: any number."""
    if owner is None:
        return None
    if limits and limits.recipients_per_hour is not None:
        return limits.recipients_per_hour
    return conf.RECIPIENTS_PER_HOUR or None


def check_limit(owner: Any, limit: int, count: int, email: Email) -> None:
    # One request of an owner at a time, or several would each see what the others have left.
    get_user_model().objects.select_for_update(no_key=True).get(pk=owner.pk)
    key = email.idempotency_key
    if key and Email.objects.filter(owner=owner, idempotency_key=key).exists():
        return
    hour = timezone.now() - timedelta(hours=1)
    sent = Delivery.objects.filter(email__owner=owner, email__created_at__gt=hour).count()
    if sent + count > limit:
        raise OverLimit


def notify_relay() -> None:
    """Spares new emails the wait for the relay's next poll."""
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
    """Queues the failed and held ones among these again; returns how many."""
    count = deliveries.replay(list(chosen.order_by().values_list("pk", flat=True)))
    transaction.on_commit(notify_relay)
    return count


def cancel(chosen: QuerySet[Delivery]) -> int:
    """Cancels those among these that no worker has begun to send; returns how many."""
    return deliveries.cancel(list(chosen.order_by().values_list("pk", flat=True)))


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def authenticate(key: str) -> ApiKey | None:
    """The API key with its owner and the owner's limits; None if it is unknown or revoked."""
    digest = hash_key(key)
    user_model = get_user_model()
    models = ((ApiKey, "k"), (user_model, "u"), (SendingLimits, "l"))
    fields = [[f'{a}."{f.column}"' for f in m._meta.concrete_fields] for m, a in models]
    statement = SQL["find_key"].format(
        fields=", ".join(column for columns in fields for column in columns),
        users=f'"{user_model._meta.db_table}"',
        primary_key=f'"{user_model._meta.pk.column}"',
    )
    rows = fetch(statement, (digest,))
    if not rows:
        return None
    first, second = len(fields[0]), len(fields[0]) + len(fields[1])
    found: ApiKey = instance(ApiKey, rows[0][:first])
    found.owner = instance(user_model, rows[0][first:second])
    own = None if rows[0][second] is None else instance(SendingLimits, rows[0][second:])
    SendingLimits._meta.get_field("owner").remote_field.set_cached_value(found.owner, own)
    if not hmac.compare_digest(found.digest, digest):
        return None
    return found if found.owner.is_active and not found.revoked else None


def instance(model: Any, values: Sequence[Any]) -> Any:
    """As a QuerySet makes it of a row: `values` in the order of the model's fields."""
    fields = model._meta.concrete_fields
    converted = [
        field.from_db_value(value, None, connection) if hasattr(field, "from_db_value") else value
        for field, value in zip(fields, values, strict=True)
    ]
    return model.from_db(connection.alias, [field.attname for field in fields], converted)
