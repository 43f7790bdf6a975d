"""RabbitMQ's salted password hashes, from its page "Passwords": base64 of a salt of four bytes and the digest."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from typing import Any

NEW_HASHES = "rabbit_password_hashing_sha256"
ALGORITHMS = {NEW_HASHES: hashlib.sha256, "rabbit_password_hashing_sha512": hashlib.sha512}


def password_hash(password: str) -> str:
    """Return a hash of the password with a random salt, with the algorithm NEW_HASHES."""
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def password_matches(password: str, user: Mapping[str, Any]) -> bool:
    """Return whether the `password_hash` of a user in definitions is a hash of this password."""
    algorithm = ALGORITHMS.get(user.get("hashing_algorithm") or "")
    stored = base64.b64decode(user.get("password_hash") or "")
    return algorithm is not None and stored[4:] == algorithm(stored[:4] + password.encode()).digest()
