"""The settings of this app: EMAILS_… in the project's settings module.

Settings are read at each use. emails/checks.py reports wrong settings in Django's system checks.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from django.conf import settings

T = TypeVar("T")
# A check returns None for a valid value, or a description of the allowed values.
Check = Callable[[Any], str | None]

PREFIX = "EMAILS_"


class Setting(Generic[T]):
    """A setting with its default and check."""

    def __init__(self, default: T, check: Check) -> None:
        self.default, self.check = default, check
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = PREFIX + name

    @overload
    def __get__(self, instance: None, owner: type) -> "Setting[T]": ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> "Setting[T] | T":
        if instance is None:
            return self
        value: T = getattr(settings, self.name, self.default)
        return value


def is_number(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether the value is a finite number and has one of these types."""
    number = isinstance(value, kinds) and not isinstance(value, bool)
    return number and abs(value) < float("inf")


def whole(minimum: int = 1) -> Check:
    expected = f"a whole number, {minimum} or more"
    return lambda value: None if is_number(value, int) and value >= minimum else expected


def seconds(minimum: float) -> Check:
    expected = f"a number of seconds, {minimum:g} or more"
    return lambda value: None if is_number(value, (int, float)) and value >= minimum else expected


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "a string"


def texts(value: Any) -> str | None:
    good = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    return None if good else "a list of strings"


def true_or_false(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def one_of(*allowed: str) -> Check:
    return lambda value: None if value in allowed else " or ".join(map(repr, allowed))


def senders(value: Any) -> str | None:
    expected = "a list of addresses and @domains in lower case"
    if texts(value):
        return expected
    good = all("@" in each and each == each.lower() and not each.endswith("@") for each in value)
    return None if good else expected


LIMITS: dict[str, type | tuple[type, ...]] = {"concurrent": int, "per_minute": (int, float)}


def domain_limits(value: Any) -> str | None:
    expected = (
        "a dictionary of domain (or '*', for every other) to a dictionary with 'concurrent' "
        "(a whole number, 1 or more) or 'per_minute' (a number above 0) or both"
    )
    if not isinstance(value, dict):
        return expected
    for domain, limits in value.items():
        if not isinstance(domain, str) or domain != domain.lower() or not domain:
            return expected
        if not isinstance(limits, dict) or not limits or set(limits) - set(LIMITS):
            return expected
        for name, limit in limits.items():
            if not is_number(limit, LIMITS[name]) or limit <= 0:
                return expected
    return None


class Conf:
    # ---- What may be sent ----
    ALLOWED_SENDERS = Setting[list[str]]([], senders)
    MAX_RECIPIENTS = Setting(50, whole())
    MAX_ATTACHMENTS = Setting(50, whole(0))
    MAX_EMAIL_BYTES = Setting(10 * 1024**2, whole())
    MAX_BATCH = Setting(500, whole())
    # Per owner; 0: unlimited.
    RECIPIENTS_PER_HOUR = Setting(0, whole(0))

    # ---- Delivery ----
    # The mail server: the path of an email backend, or an alias of MAILERS (Django 6.1).
    DELIVERY_BACKEND = Setting("django.core.mail.backends.smtp.EmailBackend", text)
    DELIVERY_MAILER = Setting("", text)
    # Seconds to wait for a mail server's reply, unless EMAIL_TIMEOUT or the mailer sets them.
    DELIVERY_TIMEOUT = Setting[float](10, seconds(0.1))
    DEADLINE_SECONDS = Setting(86400, seconds(1))
    RETRY_SECONDS = Setting[float](30.0, seconds(0.1))
    UNCERTAIN_POLICY = Setting("resend", one_of("resend", "hold"))
    # Seconds within which a worker's attempt must end. Afterwards, the relay can lease the
    # delivery again.
    SENDING_LEASE_SECONDS = Setting[float](600, seconds(5))
    # Maximum number of SMTP connections of all workers together; 0: one per worker process.
    SMTP_CONNECTIONS = Setting(0, whole(0))
    DOMAIN_LIMITS = Setting[dict[str, dict[str, float]]]({}, domain_limits)

    # ---- API ----
    # Whether the API's documentation needs no sign-in.
    API_DOCS_PUBLIC = Setting(False, true_or_false)

    # ---- Relay, retention, metrics ----
    RELAY_POLL_SECONDS = Setting[float](1.0, seconds(0.05))
    RELAY_THREADS = Setting(4, whole())
    RETENTION_DAYS = Setting(30, whole())
    METRICS_TOKEN = Setting("", text)


conf = Conf()


def all_settings() -> list[Setting[Any]]:
    return [value for value in vars(Conf).values() if isinstance(value, Setting)]
