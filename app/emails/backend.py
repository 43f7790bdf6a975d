from collections.abc import Sequence
from email.message import Message as ParsedMessage
from email.utils import parseaddr
from typing import Any

from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend
from django.db import transaction

from emails import services
from emails.validation import File

# In Django, these headers override the fields of a message.
REPLACED_HEADERS = {"to", "cc", "bcc", "reply-to", "message-id", "date", "from"}


class EmailBackend(BaseEmailBackend):
    """EMAIL_BACKEND = "emails.backend.EmailBackend": stores the emails of Django's mail functions.

    The backend stores emails in the caller's transaction. The workers deliver them with
    EMAILS_DELIVERY_BACKEND or EMAILS_DELIVERY_MAILER.
    """

    def __init__(self, fail_silently: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.fail_silently = fail_silently

    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        stored = 0
        with transaction.atomic():
            for message in email_messages:
                if not message.recipients():
                    continue
                try:
                    services.accept(None, submitted(message))
                except (ValidationError, ValueError):
                    if not self.fail_silently:
                        raise
                else:
                    stored += 1
        return stored


def submitted(message: EmailMessage) -> services.Message:
    text, html = str(message.body), ""
    if message.content_subtype == "html":
        text, html = "", text
    for content, mimetype in getattr(message, "alternatives", ()):
        if mimetype != "text/html" or html:
            raise ValueError(f"an alternative of type {mimetype} can't be stored")
        html = content
    headers = {name: str(value) for name, value in message.extra_headers.items()}
    sender = next(
        (value for name, value in headers.items() if name.lower() == "from"), message.from_email
    )
    return services.Message(
        subject=" ".join(str(message.subject).splitlines()) or "(no subject)",
        text=text,
        html=html,
        sender=sender,
        recipients=[bare(address) for address in message.to],
        cc=[bare(address) for address in message.cc],
        bcc=[bare(address) for address in message.bcc],
        reply_to=list(message.reply_to),
        headers={n: value for n, value in headers.items() if n.lower() not in REPLACED_HEADERS},
        attachments=[file(attachment) for attachment in message.attachments],
        show_recipients=True,
    )


def bare(address: Any) -> str:
    return parseaddr(str(address))[1]


def file(attachment: Any) -> File:
    if isinstance(attachment, ParsedMessage):  # a MIMEBase, or a MIMEPart of Django 6
        payload = attachment.get_payload(decode=True)
        return File(
            filename=attachment.get_filename() or "",
            content_type=attachment.get_content_type(),
            content=payload if isinstance(payload, bytes) else b"",
            content_id=attachment.get("Content-ID", ""),
        )
    filename, content, mimetype = attachment
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        raise ValueError(f"an attachment of {type(content).__name__} can't be stored")
    return File(filename or "", mimetype or "application/octet-stream", content)
