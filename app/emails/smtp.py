"""One SMTP transaction for one recipient, over a connection that is kept from one to the next."""

import re
import smtplib
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from django.core import mail
from django.core.mail import EmailMessage
from django.core.mail.backends.smtp import EmailBackend
from django.utils.module_loading import import_string

from emails.conf import conf
from emails.smtp_replies import ACCEPTED, NothingSent, Result, classify_error, first_refusal
from emails.states import State

# Servers close a connection that is idle or was used often; we close it before they do.
IDLE_SECONDS = 20
MESSAGES_PER_CONNECTION = 100

_kept = threading.local()


@dataclass(frozen=True, eq=False)
class Envelope:
    sender: str
    recipient: str
    content: bytes  # the message, with the line ends of SMTP
    message: EmailMessage  # the same, for a backend that is not SMTP


class LeaseLost(Exception):
    """Another worker has the delivery by now."""


def send(envelope: Envelope, begin: Callable[[], bool], upcoming: Envelope | None = None) -> Result:
    """Sends to one recipient: Django's backend says nothing about one refused among several.

    `begin` is called just before the server gets the message. If it returns false the message is
    not sent and LeaseLost is raised. Waits EMAIL_TIMEOUT seconds at most for each reply. A server
    that offers PIPELINING gets the commands of the `upcoming` one with the end of this message
    (RFC 2920, 3.1), which saves a round trip.
    """
    data_sent = False

    def begin_data() -> None:
        nonlocal data_sent
        if not begin():
            raise LeaseLost
        data_sent = True

    try:
        backend = pooled_backend()
        if isinstance(backend, EmailBackend):
            code, reply = send_envelope(backend, envelope, begin_data, upcoming)
            return Result(State.SENT, code, reply)
        send_via_backend(backend, envelope.message, begin_data)
        return Result(State.SENT, None, type(backend).__module__)
    except LeaseLost:
        raise
    except NothingSent as error:
        return classify_error(error, data_sent=False)
    except Exception as error:  # whatever it was, the delivery must not stay in "sending"
        return classify_error(error, data_sent)


# ---- The connection ----


def pooled_backend() -> Any:
    """The email backend of this thread, with its connection."""
    backend = getattr(_kept, "backend", None)
    if backend is not None and getattr(backend, "connection", None) is not None:
        idle = time.monotonic() - _kept.used > IDLE_SECONDS
        if idle or _kept.count >= MESSAGES_PER_CONNECTION:
            close()
            backend = None
    if backend is None:
        backend = _kept.backend = new_backend()
        _kept.count, _kept.used, _kept.announced = 0, time.monotonic(), None
    return backend


def new_backend() -> Any:
    if conf.DELIVERY_MAILER:
        backend = mail.mailers[conf.DELIVERY_MAILER]  # type: ignore[attr-defined]
    else:
        backend = import_string(conf.DELIVERY_BACKEND)()
    if isinstance(backend, EmailBackend) and backend.timeout is None:
        backend.timeout = conf.DELIVERY_TIMEOUT  # type: ignore[assignment]
    return backend


def close() -> None:
    """Closes the connection of this thread, if there is one."""
    backend: Any = getattr(_kept, "backend", None)
    if getattr(_kept, "announced", None) is not None:
        abort(backend)  # the server would take QUIT for the message
    _kept.backend = None
    connection = getattr(backend, "connection", None)
    if isinstance(backend, EmailBackend) and connection is not None:
        with suppress(OSError):
            if connection.sock is not None:
                connection.sock.settimeout(1)  # for the reply to QUIT
        with suppress(Exception):
            backend.close()


def abort(backend: EmailBackend) -> None:
    """Closes the connection without QUIT."""
    _kept.announced = None
    if backend.connection is not None:
        with suppress(OSError):
            backend.connection.close()
        backend.connection = None


def reset_or_abort(backend: EmailBackend, code: int) -> None:
    """Makes the connection ready for the next email after a refusal."""
    if code == 421 or backend.connection is None:
        return abort(backend)
    if _kept.announced is not None:  # the next email began already
        return None
    try:
        backend.connection.rset()
        _kept.used = time.monotonic()
    except (smtplib.SMTPException, OSError):
        abort(backend)


# ---- The dialogue ----


def send_envelope(
    backend: EmailBackend,
    envelope: Envelope,
    begin_data: Callable[[], None],
    upcoming: Envelope | None,
) -> tuple[int, str]:
    """MAIL, RCPT, DATA. Returns the server's reply to the message; raises smtplib's exceptions."""
    sender, recipient = envelope_address(envelope.sender), envelope_address(envelope.recipient)
    if _kept.announced is not None and _kept.announced is not envelope:
        abort(backend)  # it waits for another message
    announced, _kept.announced = _kept.announced, None
    try:
        reused = not backend.open()
        try:
            if not announced:
                send_commands(backend.connection, envelope)
            replies = read_replies(backend.connection, envelope)
        except (smtplib.SMTPServerDisconnected, OSError):
            if not reused:
                raise
            replies = [(421, b"")]
        if reused and replies[-1][0] == 421:
            # A 421 on a reused connection ends the session, not the message: connect and retry.
            abort(backend)
            backend.open()
            send_commands(backend.connection, envelope)
            replies = read_replies(backend.connection, envelope)
        if refusal := first_refusal(replies, sender, recipient):
            if replies[-1][0] == 354:  # it waits for a message nevertheless, and must get none
                abort(backend)
            raise refusal
        begin_data()
        connection: Any = backend.connection
        data = re.sub(rb"(?m)^\.", b"..", envelope.content) + b"\r\n.\r\n"
        if upcoming and takes_many(connection) and _kept.count + 1 < MESSAGES_PER_CONNECTION:
            data += "".join(commands(connection, upcoming)).encode("ascii")
            connection.send(data)
            _kept.announced = upcoming
        else:
            connection.send(data)
        code, reply = connection.getreply()
        if code != 250:
            raise smtplib.SMTPDataError(code, reply)
    except smtplib.SMTPResponseException as error:
        reset_or_abort(backend, error.smtp_code)
        raise
    except smtplib.SMTPRecipientsRefused as error:
        reset_or_abort(backend, error.recipients[recipient][0])
        raise
    except BaseException:
        abort(backend)
        raise
    _kept.used = time.monotonic()
    _kept.count += 1
    return code, reply.decode(errors="replace")


def envelope_address(address: str) -> str:
    """In angle brackets, without a name, the domain in ASCII. Raises ValueError if it can't be."""
    if "\r" in address or "\n" in address:
        raise ValueError("a line break in an address")
    bare = address.rpartition("<")[2].rstrip().removesuffix(">") if "<" in address else address
    if not bare.isascii():
        local, _, domain = bare.rpartition("@")
        bare = f"{local}@{domain.encode('idna').decode()}"
        bare.encode("ascii")
    return f"<{bare}>"


def takes_many(smtp: Any) -> bool:
    """Whether the server offers PIPELINING (RFC 2920): several commands at a time."""
    return bool(smtp.has_extn("pipelining"))


def commands(smtp: Any, envelope: Envelope) -> list[str]:
    option = f" size={len(envelope.content)}" if smtp.has_extn("size") else ""
    return [
        f"mail FROM:{envelope_address(envelope.sender)}{option}\r\n",
        f"rcpt TO:{envelope_address(envelope.recipient)}\r\n",
        "data\r\n",
    ]


def send_commands(smtp: Any, envelope: Envelope) -> None:
    """All three commands to a server that takes many; to others read_replies sends each."""
    smtp.ehlo_or_helo_if_needed()
    if takes_many(smtp):
        smtp.send("".join(commands(smtp, envelope)))


def read_replies(smtp: Any, envelope: Envelope) -> list[tuple[int, bytes]]:
    """The replies to MAIL, RCPT and DATA as (code, text), up to the first refusal."""
    at_once = takes_many(smtp)
    replies: list[tuple[int, bytes]] = []
    refused = False
    for command, good in zip(commands(smtp, envelope), ACCEPTED, strict=True):
        try:
            replies.append(smtp.getreply() if at_once else smtp.docmd(command.rstrip()))
        except (smtplib.SMTPServerDisconnected, OSError):
            if not refused:
                raise
            break  # the refusal stands that it sent before it hung up
        refused = refused or replies[-1][0] not in good
        if refused and (not at_once or replies[-1][0] == 421):
            break
    return replies


def send_via_backend(backend: Any, message: EmailMessage, begin_data: Callable[[], None]) -> None:
    """By a backend other than Django's SMTP: one call, of which no part is known."""
    begin_data()
    if not backend.send_messages([message]):
        raise NothingSent("the email backend says that it sent nothing")
