import re
import smtplib
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from email.encoders import encode_base64
from email.mime.base import MIMEBase
from email.utils import format_datetime

from django.conf import settings
from django.core.mail import EmailMultiAlternatives, get_connection
from django.core.mail.backends.smtp import EmailBackend
from django.core.mail.message import sanitize_address

from emails.models import Delivery, State

# Servers end a connection that is idle or was used often; we do it before them.
IDLE_SECONDS = 20
MESSAGES_A_CONNECTION = 100

# Codes with which MAIL, RCPT and DATA go on.
ACCEPTED = ((250,), (250, 251), (354,))

_held = threading.local()


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt. `code` is the SMTP reply's, None if there was no reply."""

    state: State
    code: int | None
    answer: str


class LeaseLost(Exception):
    """Somebody else has the delivery by now."""


def send(delivery: Delivery) -> Outcome:
    """One SMTP transaction for one recipient.

    One at a time, as Django says nothing about a recipient refused among others. Blocks up to
    EMAIL_TIMEOUT for each reply of the server. Raises LeaseLost before anything was sent.
    """
    try:
        message = build(delivery)
        content = message.message().as_bytes(linesep="\r\n")
    except Exception as error:  # no server will make a message of this
        return Outcome(State.FAILED, None, f"{type(error).__name__}: {error}")
    backend = hold()
    try:
        if isinstance(backend, EmailBackend):
            code, reply = transact(backend, message, content, delivery)
        else:
            code, reply = hand_over(backend, message, delivery)
    except LeaseLost:
        raise
    except Exception as error:  # whatever it was, the row must not stay behind in "sending"
        return failure(error, delivery.data_sent)
    return Outcome(State.SENT, code, reply)


def build(delivery: Delivery) -> EmailMultiAlternatives:
    email = delivery.email
    to, cc = [delivery.recipient], []
    if email.show_recipients:
        named = list(email.deliveries.values_list("recipient", "kind"))
        to = [recipient for recipient, kind in named if kind == Delivery.Kind.TO]
        cc = [recipient for recipient, kind in named if kind == Delivery.Kind.CC]
    message = EmailMultiAlternatives(
        subject=email.subject,
        body=email.text,
        from_email=email.sender,
        to=to,
        cc=cc,
        reply_to=email.reply_to,
        headers={
            **email.headers,
            "Message-ID": delivery.message_id,
            "Date": format_datetime(email.created_at),
        },
    )
    if email.html and email.text:
        message.attach_alternative(email.html, "text/html")
    elif email.html:
        message.body, message.content_subtype = email.html, "html"
    for attachment in email.attachments.all() if delivery.has_attachments else ():
        if attachment.content_id:
            part = MIMEBase(*attachment.content_type.split("/"))
            part.set_payload(bytes(attachment.content))
            encode_base64(part)
            part["Content-ID"] = attachment.content_id
            part.add_header("Content-Disposition", "inline", filename=attachment.filename)
            message.attach(part)
        else:
            message.attach(attachment.filename, bytes(attachment.content), attachment.content_type)
    # The envelope has one recipient, whatever the header shows.
    message.recipients = lambda: [delivery.recipient]
    return message


def hold():
    """The backend of this process (or thread), its connection kept from one email to the next."""
    backend = getattr(_held, "backend", None)
    old = (
        backend is not None
        and getattr(backend, "connection", None) is not None
        and (time.monotonic() - _held.used > IDLE_SECONDS or _held.count >= MESSAGES_A_CONNECTION)
    )
    if old:
        forget()
    if backend is None or old:
        _held.backend = get_connection(settings.DELIVERY_BACKEND)
        _held.count = 0
    return _held.backend


def forget() -> None:
    """Ends the connection, if there is one."""
    backend = getattr(_held, "backend", None)
    _held.backend = None
    if isinstance(backend, EmailBackend) and backend.connection is not None:
        with suppress(OSError):
            if backend.connection.sock is not None:
                backend.connection.sock.settimeout(1)  # a farewell isn't worth a wait
        with suppress(Exception):
            backend.close()


def drop(backend: EmailBackend) -> None:
    """Ends the connection without a farewell."""
    if backend.connection is not None:
        with suppress(OSError):
            backend.connection.close()
        backend.connection = None


def transact(backend, message, content: bytes, delivery: Delivery) -> tuple[int, str]:
    """MAIL, RCPT, DATA. Returns the server's yes; raises what smtplib would raise."""
    encoding = message.encoding or settings.DEFAULT_CHARSET
    sender = envelope_address(message.from_email, encoding)
    recipient = envelope_address(delivery.recipient, encoding)
    try:
        reused = not backend.open()
        try:
            replies = introduce(backend.connection, sender, recipient, len(content))
        except (smtplib.SMTPServerDisconnected, OSError):
            if not reused:
                raise
            replies = [(421, b"")]
        if reused and replies[-1][0] == 421:  # it was tired of the connection, not of the email
            drop(backend)
            backend.open()
            replies = introduce(backend.connection, sender, recipient, len(content))
        smtp = backend.connection
        refused = [code not in good for (code, _), good in zip(replies, ACCEPTED, strict=False)]
        if True in refused:
            if replies[-1][0] == 354:  # it awaits a message nevertheless, and is to have none
                drop(backend)
            code, reply = replies[refused.index(True)]
            if refused[0]:
                raise smtplib.SMTPSenderRefused(code, reply, sender)
            if refused[1]:
                raise smtplib.SMTPRecipientsRefused({recipient: (code, reply)})
            raise smtplib.SMTPDataError(code, reply)
        if not delivery.mark_data():
            drop(backend)
            raise LeaseLost
        delivery.data_sent = True
        smtp.send(re.sub(rb"(?m)^\.", b"..", content) + b"\r\n.\r\n")
        code, reply = smtp.getreply()
        if code != 250:
            raise smtplib.SMTPDataError(code, reply)
    except smtplib.SMTPResponseException as error:
        leave(backend, error.smtp_code)
        raise
    except smtplib.SMTPRecipientsRefused as error:
        leave(backend, error.recipients[recipient][0])
        raise
    except BaseException:
        drop(backend)
        raise
    _held.used = time.monotonic()
    _held.count += 1
    return code, reply.decode(errors="replace")


def envelope_address(address: str, encoding: str) -> str:
    """In angle brackets, without a name. Django's own way takes its time, and ASCII needs none.

    Raises ValueError for a line break, after which the rest would be a command of its own.
    """
    if "\r" in address or "\n" in address:
        raise ValueError("a line break in an address")
    return smtplib.quoteaddr(address if address.isascii() else sanitize_address(address, encoding))


def introduce(smtp: smtplib.SMTP, sender: str, recipient: str, size: int):
    """The replies to MAIL, RCPT and DATA as (code, text), up to the first refusal.

    A server that offers PIPELINING (RFC 2920) gets all three at once, so that a distant one is
    waited for once instead of three times, and answers each.
    """
    smtp.ehlo_or_helo_if_needed()
    size = f" size={size}" if smtp.has_extn("size") else ""
    commands = [f"mail FROM:{sender}{size}", f"rcpt TO:{recipient}", "data"]
    at_once = smtp.has_extn("pipelining")
    if at_once:
        smtp.send("".join(f"{command}\r\n" for command in commands))
    replies, refused = [], False
    for command, good in zip(commands, ACCEPTED, strict=True):
        try:
            replies.append(smtp.getreply() if at_once else smtp.docmd(command))
        except (smtplib.SMTPServerDisconnected, OSError):
            if not refused:
                raise
            break  # what it said before it left stands
        refused = refused or replies[-1][0] not in good
        if refused and (not at_once or replies[-1][0] == 421):
            break
    return replies


def leave(backend: EmailBackend, code: int) -> None:
    """Makes the connection ready for the next email after a refusal, or gives it up."""
    if code == 421 or backend.connection is None:
        return drop(backend)
    try:
        backend.connection.rset()
        _held.used = time.monotonic()
    except (smtplib.SMTPException, OSError):
        drop(backend)


def hand_over(backend, message, delivery: Delivery) -> tuple[int | None, str]:
    """To a backend that isn't Django's own for SMTP, in one call of which no part is known."""
    if not delivery.mark_data():
        raise LeaseLost
    delivery.data_sent = True
    if not backend.send_messages([message]):
        delivery.data_sent = False
        raise RuntimeError("the email backend says that it sent nothing")
    return None, type(backend).__module__


def failure(error: Exception, data_sent: bool) -> Outcome:
    """Sorts an error: failed only if the server refused this very message for good.

    A failed login or a server that turns everybody away is for the operator to mend; meanwhile
    the email waits. Without an answer to the message itself nobody knows.
    """
    code, reason = getattr(error, "status_code", None), str(error)
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        code, reply = next(iter(error.recipients.values()))
        reason = reply.decode(errors="replace")
    elif isinstance(error, smtplib.SMTPResponseException):
        code = error.smtp_code
        reply = error.smtp_error
        reason = reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
    about_this_message = (
        smtplib.SMTPRecipientsRefused,
        smtplib.SMTPSenderRefused,
        smtplib.SMTPDataError,
    )
    not_even_connected = (ConnectionRefusedError, socket.gaierror, smtplib.SMTPConnectError)
    answered = isinstance(code, int) and code > 0
    if isinstance(error, about_this_message) and answered:
        state = State.FAILED if code >= 500 else State.DEFERRED
    elif answered and not isinstance(error, smtplib.SMTPException):  # a provider's HTTP status
        state = State.FAILED if code in (400, 413, 422) else State.DEFERRED
        state = State.UNCERTAIN if code in (502, 504) else state
    elif data_sent and not isinstance(error, not_even_connected):
        state = State.UNCERTAIN
    else:
        state = State.DEFERRED
    answer = f"{type(error).__name__}: {reason}".replace("\0", "")
    return Outcome(state, code if answered else None, answer)
