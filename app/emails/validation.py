"""Validates an email before it is stored. Each check raises ValidationError with a message."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.errors import ObsoleteHeaderDefect
from email.policy import default as email_policy
from functools import lru_cache
from typing import Any
from unicodedata import category, is_normalized

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.utils import timezone

from emails.conf import conf
from emails.models import Attachment, Email, SendingLimits

# Line separators and other control characters, which could start a new header.
FORBIDDEN_IN_HEADERS = ("Cc", "Zl", "Zp")
LONGEST_HEADER = 998
LONGEST_LOCAL_PART = 64
LONGEST_ADDRESS = 254
CONTENT_TYPE = re.compile(r"(?!multipart/|message/)[a-z0-9][\w.+-]*/[a-z0-9][\w.+-]*", re.I | re.A)
HEADER_NAME = re.compile(r"[!-9;-~]{1,76}")
MAX_HEADERS = 50
# Headers that other fields set, or that mail servers add.
OWN_HEADERS = {
    *("from", "to", "cc", "bcc", "reply-to", "subject", "date", "message-id", "sender"),
    *("return-path", "received", "content-type", "content-transfer-encoding", "mime-version"),
    *("content-disposition", "content-id", "dkim-signature", "delivered-to"),
}


@dataclass(frozen=True)
class File:
    filename: str
    content_type: str
    content: bytes
    content_id: str = ""


def field_length(model: Any, name: str) -> int:
    length: int = model._meta.get_field(name).max_length
    return length


def check_storable(value: str) -> None:
    # PostgreSQL can't store null characters, and lone surrogates have no UTF-8 encoding.
    try:
        value.encode()
    except UnicodeEncodeError:
        storable = False
    else:
        storable = "\0" not in value
    if not storable:
        raise ValidationError("must not contain null characters or lone surrogates")


def check_body(value: str) -> None:
    if not value.strip():
        raise ValidationError("must not be empty")
    check_storable(value)


def check_header(value: str, limit: int = LONGEST_HEADER) -> None:
    check_storable(value)
    if len(value) > limit:
        raise ValidationError(f"must not be longer than {limit} characters")
    if any(category(character) in FORBIDDEN_IN_HEADERS for character in value):
        raise ValidationError("must not contain line breaks or control characters")


def check_subject(value: str) -> None:
    check_body(value)
    check_header(value, field_length(Email, "subject"))


def check_address(value: str) -> None:
    """Requires an address that mail servers accept, without a name."""
    validate_email(value)
    local, _, domain = value.rpartition("@")
    longest = LONGEST_ADDRESS - len(local) - 1
    if '"' in local or len(local) > LONGEST_LOCAL_PART or len(ascii_domain(domain)) > longest:
        raise ValidationError("is not an email address that mail servers accept")


def ascii_domain(domain: str) -> str:
    if domain.isascii():
        return domain
    # IDNA drops or replaces some characters, such as a soft hyphen, and yields another domain.
    try:
        encoded = domain.encode("idna")
        same = encoded.decode("idna") == domain.lower() and is_normalized("NFKC", domain)
    except UnicodeError:
        same = False
    if not same:
        raise ValidationError("has a domain with characters that IDNA changes")
    return encoded.decode()


@lru_cache(maxsize=1024)
def bare_address(value: str) -> str:
    """The address in `Name <address>`, or the address itself. Raises ValidationError."""
    if "<" not in value and not set(' ":;,()') & set(value):
        check_address(value)
        return value
    check_header(value)
    try:
        parsed = email_policy.header_factory("From", value)
        groups = parsed.groups
    except (ValueError, IndexError, AttributeError, TypeError):  # raised by Python's parser
        raise ValidationError("is not one address") from None
    # A period in a name without quotes is obsolete syntax, but common.
    defects = [each for each in parsed.defects if not isinstance(each, ObsoleteHeaderDefect)]
    if len(groups) != 1 or len(groups[0].addresses) != 1 or defects:
        raise ValidationError("is not one address")
    address = str(groups[0].addresses[0].addr_spec)
    check_address(address)
    # The envelope uses the text in the last angle brackets, so nothing may follow them.
    if not value.endswith(f"<{address}>"):
        raise ValidationError("is not one address")
    return address


def check_sender(value: str, owner: Any) -> None:
    check_header(value, field_length(Email, "sender"))
    address = bare_address(value).lower()
    if owner is None:
        return
    limits: SendingLimits | None = getattr(owner, "sending_limits", None)
    own = set(limits.senders.lower().split()) if limits else set()
    default = bare_address(settings.DEFAULT_FROM_EMAIL).lower()
    allowed = own or {default, *conf.ALLOWED_SENDERS}
    if {address, f"@{address.rpartition('@')[2]}"}.isdisjoint(allowed):
        raise ValidationError("is not an allowed sender")


def check_recipients(value: Sequence[str], kinds: Mapping[str, str]) -> None:
    if not 1 <= len(kinds) <= conf.MAX_RECIPIENTS:
        raise ValidationError(
            f"must name between 1 and {conf.MAX_RECIPIENTS} recipients, cc and bcc included"
        )
    check_addresses(value, kinds)


def check_addresses(value: Sequence[str], kinds: Mapping[str, str]) -> None:
    if len(kinds) > conf.MAX_RECIPIENTS:  # check_recipients has reported it
        return
    for recipient in dict.fromkeys(value):
        try:
            check_header(recipient)
            check_address(recipient)
        except ValidationError:
            number = value.index(recipient) + 1
            raise ValidationError(f"recipient {number} is not an email address") from None


def check_reply_to(value: Sequence[str]) -> None:
    if len(value) > conf.MAX_RECIPIENTS:
        raise ValidationError(f"must not name more than {conf.MAX_RECIPIENTS} addresses")
    for number, address in enumerate(value, start=1):
        try:
            check_header(address)
            bare_address(address)
        except ValidationError:
            raise ValidationError(f"address {number} is not an email address") from None


def check_headers(value: Mapping[str, str]) -> None:
    if len(value) > MAX_HEADERS:
        raise ValidationError(f"must not contain more than {MAX_HEADERS} headers")
    seen = set()
    for name, content in value.items():
        if not HEADER_NAME.fullmatch(name) or name.lower() in OWN_HEADERS:
            raise ValidationError(f"must not contain {name[:40]!r}")
        if name.lower() in seen:
            raise ValidationError(f"must not contain {name!r} more than once")
        seen.add(name.lower())
        check_header(content)


def check_attachments(value: Sequence[File], text: str, html: str) -> None:
    if len(value) > conf.MAX_ATTACHMENTS:
        raise ValidationError(f"must not be more than {conf.MAX_ATTACHMENTS}")
    size = sum(len(part.encode(errors="replace")) for part in (text, html))
    for number, file in enumerate(value, start=1):
        size += len(file.content)
        try:
            check_header(file.filename, field_length(Attachment, "filename"))
        except ValidationError:
            raise ValidationError(f"attachment {number} has a bad filename") from None
        try:
            check_header(file.content_id, field_length(Attachment, "content_id"))
        except ValidationError:
            raise ValidationError(f"attachment {number} has a bad content_id") from None
        longest = field_length(Attachment, "content_type")
        if len(file.content_type) > longest or not CONTENT_TYPE.fullmatch(file.content_type):
            raise ValidationError(f"attachment {number} has a bad content_type")
    if size > conf.MAX_EMAIL_BYTES:
        raise ValidationError(
            f"bodies and attachments must not be larger than {conf.MAX_EMAIL_BYTES} bytes"
        )


def check_time(value: datetime | None, after: datetime | None = None) -> None:
    """Requires a time after `after`, or after now if `after` is None."""
    if value is None:
        return
    if timezone.is_naive(value):
        raise ValidationError("must have a time zone")
    now = timezone.now()
    if not now < value <= now + timedelta(days=conf.RETENTION_DAYS):
        raise ValidationError(f"must be within the next {conf.RETENTION_DAYS} days")
    if after is not None and timezone.is_aware(after) and value <= after:
        raise ValidationError("must be later than send_at")


def check_key(value: str | None) -> None:
    if value is None:
        return
    if not 1 <= len(value) <= 255 or not (value.isascii() and value.isprintable()):
        raise ValidationError("must be 1 to 255 printable ASCII characters")
