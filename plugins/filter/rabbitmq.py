"""Hashes passwords for RabbitMQ and compares versions of RabbitMQ and Erlang."""

from __future__ import annotations

import base64
import hashlib


def rabbitmq_password_hash(password, salt_of):
    """Return RabbitMQ's salted SHA-256 of a password: base64 of a salt of four bytes and the digest (its page "Passwords").

    The salt is derived from the secret `salt_of`, so that each run writes the same file.
    """
    salt = hashlib.sha256(str(salt_of).encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + str(password).encode()).digest()).decode()


def _begins(version, prefix):
    """Return whether a version such as 27.3.4 belongs to the series 27, or a series such as 27 contains the version."""
    ours, theirs = str(version).split("."), str(prefix).split(".")
    length = min(len(ours), len(theirs))
    return ours[:length] == theirs[:length]


def _release(version):
    """Return a version as numbers. A series is treated as its newest release, which a package manager would install."""
    numbers = [int(part) for part in str(version).split(".")]
    return (*numbers, 9999)[:3] if len(numbers) == 2 else tuple(numbers)


def rabbitmq_compatibility(table, rabbitmq, erlang):
    """Return `supported`, `paired`, `refused`, or `unknown` if the table lacks the RabbitMQ series."""
    try:
        release = _release(rabbitmq)
    except ValueError:
        return "unknown"
    for row in table:
        since = _release(row["since"])
        if since[:2] == release[:2] and since <= release:
            if any(_begins(erlang, version) for version in row["erlang"]):
                return "supported"
            return "paired" if any(_begins(erlang, version) for version in row["paired"]) else "refused"
    return "unknown"


class FilterModule:
    def filters(self):
        return {
            "rabbitmq_password_hash": rabbitmq_password_hash,
            "rabbitmq_compatibility": rabbitmq_compatibility,
        }
