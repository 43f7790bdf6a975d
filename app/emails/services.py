import unicodedata
from collections.abc import Sequence
from email.utils import parseaddr

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.db import transaction

from emails.models import Delivery, Email

# Line separators and other control characters: in a header they start a new one.
FORBIDDEN_IN_HEADERS = ("Cc", "Zl", "Zp")


def accept(
    owner, *, subject: str, text: str, recipients: Sequence[str], sender: str = "", html: str = ""
) -> Email:
    """Stores an email and its deliveries in one transaction; sending happens elsewhere, later.

    Without `sender` it is DEFAULT_FROM_EMAIL. Raises ValidationError with the messages by field,
    the fields named as the API names them.
    """
    sender = sender or settings.DEFAULT_FROM_EMAIL
    recipients = list(dict.fromkeys(recipients))
    checks = {
        "subject": (check_header, subject),
        "text": (check_body, text),
        "html": (check_storable, html),
        "from": (check_sender, sender),
        "to": (check_recipients, recipients),
    }
    errors = {}
    for field, (check, value) in checks.items():
        try:
            check(value)
        except ValidationError as error:
            errors[field] = error
    if errors:
        raise ValidationError(errors)

    with transaction.atomic():
        email = Email.objects.create(
            owner=owner, sender=sender, subject=subject, text=text, html=html
        )
        Delivery.objects.bulk_create(
            Delivery(email=email, recipient=recipient) for recipient in recipients
        )
    return email


def check_storable(value: str) -> None:
    # PostgreSQL has no null character, and half of a surrogate pair has no UTF-8.
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValidationError("must not contain null characters or lone surrogates")


def check_body(value: str) -> None:
    if not value.strip():
        raise ValidationError("must not be empty")
    check_storable(value)


def check_header(value: str) -> None:
    check_body(value)
    limit = Email._meta.get_field("subject").max_length
    if len(value) > limit:
        raise ValidationError(f"must not be longer than {limit} characters")
    if any(unicodedata.category(character) in FORBIDDEN_IN_HEADERS for character in value):
        raise ValidationError("must not contain line breaks or control characters")


def check_sender(value: str) -> None:
    check_header(value)
    address = parseaddr(value)[1]
    validate_email(address)
    allowed = {parseaddr(settings.DEFAULT_FROM_EMAIL)[1].lower(), *settings.ALLOWED_SENDERS}
    domain = address.lower().rpartition("@")[2]
    if allowed.isdisjoint({address.lower(), f"@{domain}"}):
        raise ValidationError("is not an allowed sender")


def check_recipients(value: list[str]) -> None:
    if not 1 <= len(value) <= settings.MAX_RECIPIENTS:
        raise ValidationError(f"must name between 1 and {settings.MAX_RECIPIENTS} recipients")
    for number, recipient in enumerate(value, start=1):
        try:
            check_storable(recipient)
            validate_email(recipient)
        except ValidationError:
            raise ValidationError(f"recipient {number} is not an email address") from None
