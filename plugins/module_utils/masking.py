"""Finds and masks passwords in URIs. Parameters of shovels and federation upstreams contain such URIs."""

from __future__ import annotations

import re
from typing import Any

# "@" and "/" in a password must be percent-encoded. RabbitMQ refuses a URI in which they are not encoded, and its answer repeats
# the URI.
PASSWORD_IN_URI = re.compile(r"(?<=://)([^/@\s:]*):([^\s\"',]+)(?=@)")


def uri_passwords(value: Any) -> set[str]:
    """Return the passwords in URIs in a string, or in all strings of nested lists and mappings."""
    if isinstance(value, dict):
        return {password for item in value.values() for password in uri_passwords(item)}
    if isinstance(value, list):
        return {password for item in value for password in uri_passwords(item)}
    return {password for _, password in PASSWORD_IN_URI.findall(value)} if isinstance(value, str) else set()


def masked(value: Any) -> Any:
    """Return the value with `********` instead of each password in a URI. Nested lists and mappings are copied."""
    if isinstance(value, dict):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    return PASSWORD_IN_URI.sub(r"\1:********", value) if isinstance(value, str) else value
