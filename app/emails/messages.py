"""Builds the message of a delivery with Django's classes."""

import email.policy
from email._policybase import Compat32
from email.encoders import encode_base64
from email.generator import BytesGenerator
from email.mime.base import MIMEBase
from email.utils import format_datetime
from io import BytesIO
from typing import Any

import django
from django.core.mail import EmailMultiAlternatives

from emails.delivery_records import Claimed
from emails.models import Attachment, Delivery


def build(delivery: Claimed) -> EmailMultiAlternatives:
    to, cc = [delivery.recipient], []
    if delivery.show_recipients:
        named = list(
            Delivery.objects.filter(email=delivery.email_id).values_list("recipient", "kind")
        )
        to = [recipient for recipient, kind in named if kind == Delivery.Kind.TO]
        cc = [recipient for recipient, kind in named if kind == Delivery.Kind.CC]
    message = EmailMultiAlternatives(
        subject=delivery.subject,
        body=delivery.text,
        from_email=delivery.sender,
        to=to,
        cc=cc,
        reply_to=delivery.reply_to,
        headers={
            **delivery.headers,
            "Message-ID": delivery.message_id,
            "Date": format_datetime(delivery.created_at),
        },
    )
    if delivery.html and delivery.text:
        message.attach_alternative(delivery.html, "text/html")
    elif delivery.html:
        message.body, message.content_subtype = delivery.html, "html"
    if delivery.has_attachments:
        for attachment in Attachment.objects.filter(email=delivery.email_id):
            attach(message, attachment)
    # The envelope has one recipient, even if the header names several.
    message.recipients = lambda: [delivery.recipient]  # type: ignore[method-assign]
    return message


def attach(message: EmailMultiAlternatives, attachment: Attachment) -> None:
    """Attaches a file as base64, which preserves line endings. Django would encode texts
    differently."""
    content = bytes(attachment.content)
    maintype, subtype = attachment.content_type.split("/")
    part: Any
    if django.VERSION >= (6, 0):
        part = email.message.MIMEPart()
        part.set_content(content, maintype, subtype, cte="base64")
    else:
        part = MIMEBase(maintype, subtype)
        part.set_payload(content)
        encode_base64(part)
    if maintype == "text" and is_utf8(content):
        part.set_param("charset", "utf-8")
    filename = {"filename": attachment.filename} if attachment.filename else {}
    if attachment.content_id:
        part["Content-ID"] = attachment.content_id
    disposition = "inline" if attachment.content_id else "attachment"
    part.add_header("Content-Disposition", disposition, **filename)
    message.attach(part)


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


class ShortHeaders(Compat32):
    """Writes short ASCII headers without folding them.

    Such headers need no folding. Folding takes a third of the time to build a message.
    """

    LONGEST = 76

    def fold_binary(self, name: str, value: Any) -> bytes:
        if isinstance(value, str) and value.isascii() and value.isprintable():
            line = f"{name}: {value}"
            if value == value.strip() and len(line) <= self.LONGEST:
                return (line + self.linesep).encode("ascii")
        return super().fold_binary(name, value)


def as_bytes(message: EmailMultiAlternatives) -> bytes:
    """The message with CRLF line ends."""
    if django.VERSION >= (6, 0):
        made: Any = message.message(policy=email.policy.SMTP)  # type: ignore[call-arg]
        return bytes(made.as_bytes())
    written = BytesIO()
    policy = ShortHeaders(linesep="\r\n")
    BytesGenerator(written, mangle_from_=False, policy=policy).flatten(message.message())
    return written.getvalue()
