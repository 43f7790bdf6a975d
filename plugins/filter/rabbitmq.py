"""Values that RabbitMQ wants in forms of its own."""

from __future__ import annotations

import base64
import hashlib


def rabbitmq_password_hash(password, salt_of):
    """RabbitMQ's salted SHA-256 of a password: base64 of four bytes of salt and the digest (its page "Passwords").

    The salt is derived from `salt_of`, a secret, so that the same data gives the same file in each run.
    """
    salt = hashlib.sha256(str(salt_of).encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + str(password).encode()).digest()).decode()


def _begins(version, prefix):
    """Whether a version such as 27.3.4 is of the series 27, or a series such as 27 holds the version."""
    ours, theirs = str(version).split("."), str(prefix).split(".")
    length = min(len(ours), len(theirs))
    return ours[:length] == theirs[:length]


def _release(version):
    """A version as numbers; a series stands for its newest release, which is what a package manager installs."""
    numbers = [int(part) for part in str(version).split(".")]
    return (*numbers, 9999)[:3] if len(numbers) == 2 else tuple(numbers)


def rabbitmq_compatibility(table, rabbitmq, erlang):
    """`supported`, `paired`, `refused` or, for a RabbitMQ whose series the table does not have, `unknown`."""
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
