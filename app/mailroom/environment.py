"""Reads environment variables. An invalid value raises an error that names the variable."""

import json
from collections.abc import Callable
from email.utils import parseaddr
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.validators import validate_email

from emails.conf import domain_limits

env = environ.Env()


def wrong(name: str, expected: str) -> ImproperlyConfigured:
    """The error for an invalid value. The error omits the value, which may contain a password."""
    return ImproperlyConfigured(f"environment variable {name}: expected {expected}")


def boolean(name: str, default: bool) -> bool:
    # django-environ reads unknown words as false.
    match env.str(name, str(default)).lower():
        case "true" | "yes" | "on" | "1":
            return True
        case "false" | "no" | "off" | "0":
            return False
    raise wrong(name, "true or false")


def number(name: str, default: float, minimum: float = 1) -> Any:
    kind = type(default)
    try:
        value = kind(env.str(name, str(default)))
    except ValueError:
        raise wrong(name, "a number") from None
    if not minimum <= value < float("inf"):
        raise wrong(name, f"a number, {minimum} or more")
    return value


def choice(name: str, *allowed: str) -> str:
    value: str = env.str(name, allowed[0])
    if value not in allowed:
        raise wrong(name, " or ".join(allowed))
    return value


def url(name: str, default: str, parse: Callable[[str], Any], schemes: tuple[str, ...]) -> Any:
    value = env.str(name, default)
    expected = f"a URL that starts with {', '.join(f'{scheme}://' for scheme in schemes)}"
    if value.partition("://")[0] not in schemes:
        raise wrong(name, expected)
    try:
        return parse(value)
    except (ValueError, ImproperlyConfigured):
        raise wrong(name, expected) from None


def address(name: str, value: str) -> str:
    try:
        validate_email(parseaddr(value)[1])
    except ValidationError:
        raise wrong(name, "email addresses") from None
    return value


def networks(name: str) -> list[IPv4Network | IPv6Network]:
    """Reads a list of addresses and networks, and adds the loopback addresses."""
    try:
        return [ip_network(entry) for entry in ["127.0.0.0/8", "::1", *env.list(name, default=[])]]
    except ValueError:
        raise wrong(name, "a list of IP addresses or networks") from None


def limits(name: str) -> dict[str, dict[str, float]]:
    """Reads JSON: the limits per domain, with * for all others (EMAILS_DOMAIN_LIMITS)."""
    try:
        value: Any = json.loads(env.str(name, "") or "{}")
    except ValueError:
        value = None
    if expected := domain_limits(value):
        raise wrong(name, f"JSON, {expected}")
    limits: dict[str, dict[str, float]] = value
    return limits


def broker_urls(value: str) -> str:
    """Checks `value`: one URL, or the URLs of a cluster's nodes, separated by `;`."""
    for node in value.split(";"):
        parts = urlsplit(node)
        if parts.scheme not in ("amqp", "amqps") or not parts.hostname or parts.port == 0:
            raise ValueError
    return value
