"""Interprets the replies of a mail server."""

import re
import smtplib
import socket
from dataclasses import dataclass
from typing import Any

from emails.states import State

# Success codes of MAIL, RCPT and DATA.
ACCEPTED = ((250,), (250, 251), (354,))
# Enhanced status codes (RFC 3463): the recipient does not exist or accepts no mail.
NO_SUCH_RECIPIENT = re.compile(r"\b5\.(1\.[1236]|1\.10|2\.1)\b")
ENHANCED_CODE = re.compile(r"\b5\.\d{1,3}\.\d{1,3}\b")


@dataclass(frozen=True)
class Result:
    """The result of an attempt. `code` is the SMTP reply's code, or None without a reply."""

    state: State
    code: int | None
    answer: str
    no_such_recipient: bool = False


class NothingSent(RuntimeError):
    """The email backend reports that it sent nothing."""


def first_refusal(
    replies: list[tuple[int, bytes]], sender: str, recipient: str
) -> smtplib.SMTPException | None:
    for number, ((code, reply), good) in enumerate(zip(replies, ACCEPTED, strict=False)):
        if code in good:
            continue
        if number == 0:
            return smtplib.SMTPSenderRefused(code, reply, sender)
        if number == 1:
            return smtplib.SMTPRecipientsRefused({recipient: (code, reply)})
        return smtplib.SMTPDataError(code, reply)
    return None


def classify_error(error: Exception, data_sent: bool) -> Result:
    """The outcome: failed only if the server refused this message permanently.

    After a failed login, or if the server refuses everything, the email is deferred until the
    operator has solved the problem. Without a reply to the message, the outcome is uncertain.
    """
    code: Any = getattr(error, "status_code", None)
    reason = str(error)
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        code, reply = next(iter(error.recipients.values()))
        reason = reply.decode(errors="replace")
    elif isinstance(error, smtplib.SMTPResponseException):
        code, said = error.smtp_code, error.smtp_error
        reason = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    about_this_message = (
        smtplib.SMTPRecipientsRefused,
        smtplib.SMTPSenderRefused,
        smtplib.SMTPDataError,
    )
    not_connected = (ConnectionRefusedError, socket.gaierror, smtplib.SMTPConnectError)
    answered = isinstance(code, int) and code > 0
    if isinstance(error, about_this_message) and answered:
        state = State.FAILED if code >= 500 else State.DEFERRED
    elif answered and not isinstance(error, smtplib.SMTPException):  # a provider's HTTP status
        state = State.FAILED if code in (400, 413, 422) else State.DEFERRED
        state = State.UNCERTAIN if code in (502, 504) else state
    elif data_sent and not isinstance(error, not_connected):
        state = State.UNCERTAIN
    else:
        state = State.DEFERRED
    unknown = isinstance(error, smtplib.SMTPRecipientsRefused) and no_such_recipient(code, reason)
    answer = f"{type(error).__name__}: {reason}".replace("\0", "")
    return Result(state, code if answered else None, answer, no_such_recipient=unknown)


def no_such_recipient(code: int, reply: str) -> bool:
    """Whether the recipient was refused because of its address, not because of policy or sender."""
    if code < 500:
        return False
    if ENHANCED_CODE.search(reply):
        return bool(NO_SUCH_RECIPIENT.search(reply))
    return code in (550, 551, 553)
