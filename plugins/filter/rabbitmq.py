"""Hashes passwords for RabbitMQ and compares versions of RabbitMQ and Erlang."""

from __future__ import annotations

import base64
import hashlib

from ansible_collections.django_celery.stack.plugins.module_utils.rabbitmq_versions import compatibility


def rabbitmq_password_hash(password, salt_of):
    """Return RabbitMQ's salted SHA-256 of a password: base64 of a salt of four bytes and the digest (its page "Passwords").

    The salt is derived from the secret `salt_of`, so that each run writes the same file.
    """
    salt = hashlib.sha256(str(salt_of).encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + str(password).encode()).digest()).decode()


class FilterModule:
    def filters(self):
        return {
            "rabbitmq_password_hash": rabbitmq_password_hash,
            "rabbitmq_compatibility": compatibility,
        }
