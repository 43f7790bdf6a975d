import random
import smtplib
from dataclasses import dataclass
from datetime import timedelta

from django.core.mail import EmailMultiAlternatives

from emails.models import Delivery

FIRST_RETRY = timedelta(seconds=30)
LONGEST_RETRY = timedelta(hours=1)


@dataclass(frozen=True)
class Refusal:
    """Why an attempt failed. `code` is the SMTP reply's, None if there was no reply."""

    permanent: bool
    code: int | None
    reason: str


def send(delivery: Delivery) -> Refusal | None:
    """One SMTP transaction for one recipient; None once the server has taken the email.

    One at a time, as Django says nothing about a recipient refused among others. Each recipient
    sees only its own address. Blocks up to EMAIL_TIMEOUT for each reply of the server.
    """
    email = delivery.email
    message = EmailMultiAlternatives(
        subject=email.subject,
        body=email.text,
        from_email=email.sender,
        to=[delivery.recipient],
        headers={"Message-ID": delivery.message_id},
    )
    if email.html:
        message.attach_alternative(email.html, "text/html")
    try:
        message.send()
    except Exception as error:  # whatever it was, the row must not stay behind in "sending"
        return refusal(error)
    return None


def refusal(error: Exception) -> Refusal:
    """Sorts an error: permanent only if the server refused this very message for good.

    A failed login or a server that turns everybody away is for the operator to mend; meanwhile
    the email waits.
    """
    code, reason = None, str(error)
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
    permanent = isinstance(error, about_this_message) and code is not None and code >= 500
    reason = f"{type(error).__name__}: {reason}".replace("\0", "")
    return Refusal(permanent, code if code and code > 0 else None, reason)


def retry_delay(attempts: int) -> timedelta:
    """How long to wait after so many attempts: doubling, capped, and spread over half of itself."""
    longest = min(FIRST_RETRY * 2 ** min(attempts - 1, 10), LONGEST_RETRY)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - spreads load, hides nothing
