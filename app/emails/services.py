import hashlib
import json
import logging
import re
import time
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parseaddr
from uuid import UUID

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.db import DatabaseError, connection, transaction
from django.db.models import Count, Exists, OuterRef, Q
from django.utils import timezone

from emails import context, postgresql
from emails.models import AT_ONCE, Allowance, Attachment, Delivery, Email, State, Tally

logger = logging.getLogger(__name__)

# Line separators and other control characters: in a header they start a new one.
FORBIDDEN_IN_HEADERS = ("Cc", "Zl", "Zp")
CHANNEL = "emails_due"
# A count goes no further: on a page of 20 it is enough to know that there are more.
COUNT_LIMIT = 100
# Seconds in which one word of a process stands for all that it stores. The relay takes twice as
# long from the word to its look at the table, so it finds them.
WAKE_SECONDS = 0.01
CONTENT_TYPE = re.compile(r"(?!multipart/|message/)[a-z0-9][\w.+-]*/[a-z0-9][\w.+-]*", re.I | re.A)
HEADER_NAME = re.compile(r"[!-9;-~]+")
# Headers that are made from the fields, or belong to the way of a message.
OWN_HEADERS = {
    *("from", "to", "cc", "bcc", "reply-to", "subject", "date", "message-id", "sender"),
    *("return-path", "received", "content-type", "content-transfer-encoding", "mime-version"),
}

_woken_at = float("-inf")


class Conflict(Exception):
    """The idempotency key belongs to an email with other content."""


class OverLimit(Exception):
    """The owner has sent to as many recipients as it may within an hour."""


@dataclass(frozen=True)
class File:
    filename: str
    content_type: str
    content: bytes
    content_id: str = ""


def accept(
    owner,
    *,
    subject: str,
    text: str,
    recipients: Sequence[str] = (),
    cc: Sequence[str] = (),
    bcc: Sequence[str] = (),
    reply_to: Sequence[str] = (),
    sender: str = "",
    html: str = "",
    headers: dict[str, str] | None = None,
    attachments: Sequence[File] = (),
    deadline: datetime | None = None,
    show_recipients: bool = False,
    idempotency_key: str | None = None,
) -> Email:
    """Stores an email and its deliveries in one transaction; sending happens elsewhere, later.

    Without `sender` it is DEFAULT_FROM_EMAIL. Without `owner` it is the project's own email, which
    may have any sender. Raises ValidationError with the messages by field, the fields named as the
    API names them, Conflict or OverLimit. With the key and the content of an earlier email that one
    is returned.
    """
    sender = sender or settings.DEFAULT_FROM_EMAIL
    kinds = {}
    for kind, addresses in zip(Delivery.Kind, (recipients, cc, bcc), strict=True):
        for address in addresses:
            kinds.setdefault(address, kind.value)
    allowance = getattr(owner, "allowance", None)
    checks = {
        "subject": (check_subject, subject),
        "text": (check_body if not html or owner else check_storable, text),
        "html": (check_storable, html),
        "from": (lambda value: check_sender(value, owner, allowance), sender),
        "to": (lambda value: check_recipients(value, kinds), recipients),
        "cc": (check_addresses, cc),
        "bcc": (check_addresses, bcc),
        "reply_to": (check_reply_to, reply_to),
        "headers": (check_headers, headers or {}),
        "attachments": (lambda value: check_attachments(value, text, html), attachments),
        "deadline": (check_deadline, deadline),
        "idempotency_key": (check_key, idempotency_key),
    }
    errors = {}
    for field, (check, value) in checks.items():
        try:
            check(value)
        except ValidationError as error:
            errors[field] = error
    if errors:
        raise ValidationError(errors)

    email = Email(
        owner=owner,
        sender=sender,
        subject=subject,
        text=text,
        html=html,
        reply_to=list(reply_to),
        headers=headers or {},
        show_recipients=show_recipients or bool(cc),
        idempotency_key=idempotency_key,
        request_id=context.get("request_id"),
    )
    if idempotency_key:
        email.digest = digest(email, kinds, attachments, deadline)
    limit = hourly_limit(owner, allowance)
    # On PostgreSQL an email without attachments is one statement, which needs no transaction.
    alone = connection.vendor == "postgresql" and limit is None and not attachments
    with nullcontext() if alone else transaction.atomic():
        if limit is not None:
            check_limit(owner, limit, len(kinds), email)
        if not store(email, kinds, deadline):
            first = Email.objects.get(owner=owner, idempotency_key=idempotency_key)
            if first.digest != email.digest:
                raise Conflict
            return first
        if attachments:
            Attachment.objects.bulk_create(
                Attachment(email=email, **vars(attachment)) for attachment in attachments
            )
        transaction.on_commit(wake_relay)
    logger.info("accepted for %s recipients", len(kinds), extra={"email_id": email.pk})
    return email


def store(email: Email, kinds: dict[str, str], deadline: datetime | None) -> bool:
    """Stores email and deliveries and counts them; false, and nothing done, if its key is taken.

    Of two at a time with one key the second waits here for the first.
    """
    if connection.vendor == "postgresql":
        _, slot = Tally.place(None)
        return postgresql.store(email, kinds, due_at=AT_ONCE, expires_at=deadline, slot=slot)
    Email.objects.bulk_create([email], ignore_conflicts=True)
    if not Email.objects.filter(pk=email.pk).exists():
        return False
    Delivery.objects.bulk_create(
        Delivery(email=email, recipient=address, kind=kind, expires_at=deadline)
        for address, kind in kinds.items()
    )
    Tally.add("accepted", by=len(kinds))
    return True


def find(owner, *, state: str | None = None, text: str = ""):
    """The owner's emails with a delivery in `state` and with `text` in the subject, a recipient or
    as the id."""
    found = Email.objects.filter(owner=owner)
    deliveries = Delivery.objects.filter(email=OuterRef("pk"))
    if state:
        found = found.filter(Exists(deliveries.filter(state=state)))
    text = "".join(character for character in text.strip() if character.isprintable())
    if text:
        matches = Q(subject__icontains=text) | Exists(deliveries.filter(recipient__icontains=text))
        with suppress(ValueError):
            matches |= Q(pk=UUID(text))
        found = found.filter(matches)
    return found


def replay(deliveries) -> int:
    """Sends the dead ones among these once more."""
    count = deliveries.replay()
    transaction.on_commit(wake_relay)
    return count


def count_by_state(owner, text: str = "") -> dict[str, int | None]:
    """How many emails `find` returns for each state; for "" in any state.

    COUNT_LIMIT + 1 means more than COUNT_LIMIT. A state's count is None, as it would take too long,
    if more than COUNT_LIMIT emails match `text`.
    """

    # Unordered, so that the database may begin with the rare state or with the owner's emails.
    def bounded(emails):
        return emails.order_by()[: COUNT_LIMIT + 1]

    if not text:
        return {state: bounded(find(owner, state=state)).count() for state in ("", *State.values)}
    # A search reads all of the owner's emails if few match, so there is one search for all counts.
    matching = list(bounded(find(owner, text=text)).values_list("pk", flat=True))
    if len(matching) > COUNT_LIMIT:
        return {"": len(matching)} | dict.fromkeys(State.values)
    counts = dict(
        Delivery.objects.filter(email__in=matching)
        .values_list("state")
        .annotate(Count("email", distinct=True))
        .order_by()
    )
    return {"": len(matching)} | {state: counts.get(state, 0) for state in State.values}


def wake_relay() -> None:
    """Spares the email the wait for the relay's next look at the table."""
    global _woken_at
    if connection.vendor != "postgresql" or time.monotonic() < _woken_at + WAKE_SECONDS:
        return
    _woken_at = time.monotonic()
    try:
        postgresql.notify(CHANNEL)
    except DatabaseError as error:  # it is stored; the relay finds it
        logger.warning("the relay was not woken: %s", type(error).__name__)


def digest(email: Email, kinds: dict, attachments: Iterable[File], deadline) -> str:
    content = [
        *(email.sender, email.subject, email.text, email.html, email.reply_to, email.headers),
        *(email.show_recipients, kinds, deadline.isoformat() if deadline else None),
        [
            (each.filename, each.content_type, hashlib.sha256(each.content).hexdigest())
            for each in attachments
        ],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hourly_limit(owner, allowance: Allowance | None) -> int | None:
    """How many recipients the owner may have within an hour; None: any number."""
    if owner is None:
        return None
    if allowance and allowance.recipients_per_hour is not None:
        return allowance.recipients_per_hour
    return settings.RECIPIENTS_PER_HOUR or None


def check_limit(owner, limit: int, count: int, email: Email) -> None:
    # One request of an owner at a time, or several would each see what the others have left.
    get_user_model().objects.select_for_update(
        **({"no_key": True} if connection.vendor == "postgresql" else {})
    ).get(pk=owner.pk)
    key = email.idempotency_key
    if key and Email.objects.filter(owner=owner, idempotency_key=key).exists():
        return
    hour = timezone.now() - timedelta(hours=1)
    sent = Delivery.objects.filter(email__owner=owner, email__created_at__gt=hour).count()
    if sent + count > limit:
        raise OverLimit


def check_storable(value: str) -> None:
    # PostgreSQL has no null character, and half of a surrogate pair has no UTF-8.
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValidationError("must not contain null characters or lone surrogates")


def check_body(value: str) -> None:
    if not value.strip():
        raise ValidationError("must not be empty")
    check_storable(value)


def check_header(value: str, limit: int = 998) -> None:
    check_storable(value)
    if len(value) > limit:
        raise ValidationError(f"must not be longer than {limit} characters")
    if any(unicodedata.category(character) in FORBIDDEN_IN_HEADERS for character in value):
        raise ValidationError("must not contain line breaks or control characters")


def check_subject(value: str) -> None:
    check_body(value)
    check_header(value, Email._meta.get_field("subject").max_length)


def check_sender(value: str, owner, allowance: Allowance | None) -> None:
    check_header(value, Email._meta.get_field("sender").max_length)
    address = parseaddr(value)[1]
    validate_email(address)
    if owner is None:
        return
    own = allowance.senders.lower().split() if allowance else []
    allowed = own or {parseaddr(settings.DEFAULT_FROM_EMAIL)[1].lower(), *settings.ALLOWED_SENDERS}
    domain = address.lower().rpartition("@")[2]
    if {address.lower(), f"@{domain}"}.isdisjoint(allowed):
        raise ValidationError("is not an allowed sender")


def check_recipients(value: Sequence[str], kinds: dict) -> None:
    if not 1 <= len(kinds) <= settings.MAX_RECIPIENTS:
        raise ValidationError(
            f"must name between 1 and {settings.MAX_RECIPIENTS} recipients, cc and bcc included"
        )
    check_addresses(value)


def check_addresses(value: Iterable[str]) -> None:
    for number, recipient in enumerate(value, start=1):
        try:
            check_header(recipient)
            validate_email(recipient)
        except ValidationError:
            raise ValidationError(f"recipient {number} is not an email address") from None


def check_reply_to(value: Sequence[str]) -> None:
    if len(value) > settings.MAX_RECIPIENTS:
        raise ValidationError(f"must not name more than {settings.MAX_RECIPIENTS} addresses")
    for address in value:
        check_header(address)
    check_addresses(parseaddr(address)[1] for address in value)


def check_headers(value: dict[str, str]) -> None:
    for name, content in value.items():
        if not HEADER_NAME.fullmatch(name) or name.lower() in OWN_HEADERS:
            raise ValidationError(f"must not hold {name[:40]!r}")
        check_header(content)


def check_attachments(value: Sequence[File], text: str, html: str) -> None:
    size = sum(len(part.encode(errors="replace")) for part in (text, html))
    for number, file in enumerate(value, start=1):
        size += len(file.content)
        try:
            check_header(file.filename, Attachment._meta.get_field("filename").max_length)
        except ValidationError:
            raise ValidationError(f"attachment {number} has a bad filename") from None
        longest = Attachment._meta.get_field("content_type").max_length
        if len(file.content_type) > longest or not CONTENT_TYPE.fullmatch(file.content_type):
            raise ValidationError(f"attachment {number} has a bad content_type")
    if size > settings.MAX_EMAIL_BYTES:
        raise ValidationError(
            f"bodies and attachments must not be larger than {settings.MAX_EMAIL_BYTES} bytes"
        )


def check_deadline(value: datetime | None) -> None:
    if value is None:
        return
    if timezone.is_naive(value):
        raise ValidationError("must have a time zone")
    if not timezone.now() < value <= timezone.now() + timedelta(days=settings.RETENTION_DAYS):
        raise ValidationError(f"must be within the next {settings.RETENTION_DAYS} days")


def check_key(value: str | None) -> None:
    if value is None:
        return
    if not 1 <= len(value) <= 255 or not (value.isascii() and value.isprintable()):
        raise ValidationError("must be 1 to 255 printable ASCII characters")
