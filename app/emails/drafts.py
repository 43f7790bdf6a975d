"""A submitted email, before and after validation. Nothing is stored here."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError

from emails import context, validation
from emails.models import Delivery, Email
from emails.validation import File


@dataclass
class Message:
    """A submitted email. An empty `sender` means DEFAULT_FROM_EMAIL."""

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
        """The recipients, each with its kind: to, cc or bcc."""
        kinds: dict[str, str] = {}
        addresses = (self.recipients, self.cc, self.bcc)
        for kind, named in zip(Delivery.Kind, addresses, strict=True):
            for address in named:
                kinds.setdefault(address, kind.value)
        return kinds


@dataclass
class Draft:
    """A valid email that isn't stored yet."""

    email: Email
    message: Message
    kinds: Mapping[str, str]


def prepare(owner: Any, message: Message, idempotency_key: str | None) -> Draft:
    """Validates the message; raises ValidationError."""
    message.sender = message.sender or settings.DEFAULT_FROM_EMAIL
    kinds = message.kinds()
    check(owner, message, kinds, idempotency_key)
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
    return Draft(email, message, kinds)


def check(owner: Any, message: Message, kinds: Mapping[str, str], key: str | None) -> None:
    """Raises ValidationError with all errors by field."""
    v = validation
    body = v.check_body if owner or not message.html else v.check_storable
    checks: dict[str, Any] = {
        "subject": lambda: v.check_subject(message.subject),
        "text": lambda: body(message.text),
        "html": lambda: v.check_storable(message.html),
        "from": lambda: v.check_sender(message.sender, owner),
        "to": lambda: v.check_recipients(message.recipients, kinds),
        "cc": lambda: v.check_addresses(message.cc, kinds),
        "bcc": lambda: v.check_addresses(message.bcc, kinds),
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
