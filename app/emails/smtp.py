"""SMTP transactions, one per recipient, over a connection that is reused."""

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

# Close a connection before the server closes it because of idle time or too many messages.
IDLE_SECONDS = 20
MESSAGES_PER_CONNECTION = 100

_kept = threading.local()


@dataclass(frozen=True, eq=False)
class Envelope:
    sender: str
    recipient: str
    content: bytes  # the message with CRLF line ends
    message: EmailMessage  # the message for backends other than SMTP


class LeaseLost(Exception):
    """Another worker has the delivery now."""


def send(envelope: Envelope, begin: Callable[[], bool], upcoming: Envelope | None = None) -> Result:
    """Sends to one recipient: with several, Django's backend doesn't report which one is refused.

    Calls `begin` just before it sends the message. If that returns False, it does not send and
    raises LeaseLost. Waits EMAIL_TIMEOUT seconds at most for each reply. If the server offers
    PIPELINING, the commands of the `upcoming` envelope follow the end of this message (RFC 2920,
    3.1), which saves a round trip.
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
    except Exception as error:  # any error: the delivery must not stay in "sending"
        return classify_error(error, data_sent)


# ---- The connection ----


def pooled_backend() -> Any:
    """This thread's email backend, with its connection."""
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
    """Closes this thread's connection, if it has one."""
    backend: Any = getattr(_kept, "backend", None)
    if getattr(_kept, "announced", None) is not None:
        abort(backend)  # the server would read QUIT as the message
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
    """Resets the connection for the next email after a refusal, or aborts the connection."""
    if code == 421 or backend.connection is None:
        return abort(backend)
    if _kept.announced is not None:  # the next email's commands have been sent
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
        abort(backend)  # the server expects another message
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
            # A 421 on a reused connection refuses the session, not the message, so connect and
            # retry.
            abort(backend)
            backend.open()
            send_commands(backend.connection, envelope)
            replies = read_replies(backend.connection, envelope)
        if refusal := first_refusal(replies, sender, recipient):
            if replies[-1][0] == 354:  # it expects a message although it refused
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
    """The address in angle brackets, without a name, with an ASCII domain. Raises ValueError."""
    if "\r" in address or "\n" in address:
        raise ValueError("the address contains a line break")
    bare = address.rpartition("<")[2].rstrip().removesuffix(">") if "<" in address else address
    if not bare.isascii():
        local, _, domain = bare.rpartition("@")
        bare = f"{local}@{domain.encode('idna').decode()}"
        bare.encode("ascii")
    return f"<{bare}>"


def takes_many(smtp: Any) -> bool:
    """Whether the server offers PIPELINING (RFC 2920)."""
    return bool(smtp.has_extn("pipelining"))


def commands(smtp: Any, envelope: Envelope) -> list[str]:
    option = f" size={len(envelope.content)}" if smtp.has_extn("size") else ""
    return [
        f"mail FROM:{envelope_address(envelope.sender)}{option}\r\n",
        f"rcpt TO:{envelope_address(envelope.recipient)}\r\n",
        "data\r\n",
    ]


def send_commands(smtp: Any, envelope: Envelope) -> None:
    """Sends all three commands if the server offers PIPELINING.

    Otherwise read_replies sends each.
    """
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
            break  # keep the refusal that preceded the disconnect
        refused = refused or replies[-1][0] not in good
        if refused and (not at_once or replies[-1][0] == 421):
            break
    return replies


def send_via_backend(backend: Any, message: EmailMessage, begin_data: Callable[[], None]) -> None:
    """Sends with a backend other than Django's SMTP: a single call, without intermediate steps."""
    begin_data()
    if not backend.send_messages([message]):
        raise NothingSent("the email backend reports that it sent nothing")
