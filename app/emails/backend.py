from email.mime.base import MIMEBase
from email.utils import parseaddr

from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend
from django.db import transaction

from emails import services


class EmailBackend(BaseEmailBackend):
    """EMAIL_BACKEND = "emails.backend.EmailBackend": what Django's mail functions send is stored.

    Within the caller's transaction; a relay and workers deliver it, by DELIVERY_BACKEND.
    """

    def send_messages(self, email_messages) -> int:
        stored = 0
        with transaction.atomic():
            for message in email_messages:
                if not message.recipients():
                    continue
                try:
                    services.accept(None, **fields(message))
                except (ValidationError, ValueError):
                    if not self.fail_silently:
                        raise
                else:
                    stored += 1
        return stored


def fields(message: EmailMessage) -> dict:
    text, html = message.body, ""
    if message.content_subtype == "html":
        text, html = "", message.body
    for content, mimetype in getattr(message, "alternatives", ()):
        if mimetype != "text/html" or html:
            raise ValueError(f"an alternative of type {mimetype} can't be stored")
        html = content
    headers = dict(message.extra_headers)
    # Django lets these stand for the message's fields.
    sender = headers.pop("From", message.from_email)
    for name in ("To", "Cc", "Reply-To", "Message-ID", "Date"):
        headers.pop(name, None)
    return {
        "subject": " ".join(message.subject.splitlines()) or "(no subject)",
        "text": text,
        "html": html,
        "sender": sender,
        "recipients": [bare(address) for address in message.to],
        "cc": [bare(address) for address in message.cc],
        "bcc": [bare(address) for address in message.bcc],
        "reply_to": list(message.reply_to),
        "headers": {name: str(value) for name, value in headers.items()},
        "attachments": [file(attachment) for attachment in message.attachments],
        "show_recipients": True,
    }


def bare(address: str) -> str:
    return parseaddr(str(address))[1]


def file(attachment) -> services.File:
    if isinstance(attachment, MIMEBase):
        return services.File(
            filename=attachment.get_filename() or "",
            content_type=attachment.get_content_type(),
            content=attachment.get_payload(decode=True) or b"",
            content_id=attachment.get("Content-ID", ""),
        )
    filename, content, mimetype = attachment
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        raise ValueError(f"an attachment of {type(content).__name__} can't be stored")
    return services.File(filename or "", mimetype or "application/octet-stream", content)
