"""Passwords in URIs, which shovels and federation upstreams have in their parameters: found, and masked before printing."""

from __future__ import annotations

import re
from typing import Any

# A URI quotes "@" and "/" in a password. One that does not is refused by RabbitMQ, whose answer repeats it.
PASSWORD_IN_URI = re.compile(r"(?<=://)([^/@\s:]*):([^\s\"',]+)(?=@)")


def uri_passwords(value: Any) -> set[str]:
    """Return the passwords in the URIs of a text, or of all texts in nested lists and mappings."""
    if isinstance(value, dict):
        return {password for item in value.values() for password in uri_passwords(item)}
    if isinstance(value, list):
        return {password for item in value for password in uri_passwords(item)}
    return {password for _, password in PASSWORD_IN_URI.findall(value)} if isinstance(value, str) else set()


def masked(value: Any) -> Any:
    """Return the value with `********` in place of each password in a URI; nested lists and mappings are copied."""
    if isinstance(value, dict):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    return PASSWORD_IN_URI.sub(r"\1:********", value) if isinstance(value, str) else value
