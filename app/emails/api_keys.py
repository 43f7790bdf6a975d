"""API keys. A request with a key acts for the key's owner."""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from django.contrib.auth import get_user_model
from django.db import connection

from emails.models import ApiKey, SendingLimits
from emails.queries import fetch, load

SQL = load("emails.sql")


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def authenticate(key: str) -> ApiKey | None:
    """The API key with its owner and the owner's limits. None: the key is unknown or revoked."""
    digest = hash_key(key)
    user_model = get_user_model()
    models = ((ApiKey, "k"), (user_model, "u"), (SendingLimits, "l"))
    fields = [[f'{a}."{f.column}"' for f in m._meta.concrete_fields] for m, a in models]
    statement = SQL["find_key"].format(
        fields=", ".join(column for columns in fields for column in columns),
        users=f'"{user_model._meta.db_table}"',
        primary_key=f'"{user_model._meta.pk.column}"',
    )
    rows = fetch(statement, (digest,))
    if not rows:
        return None
    first, second = len(fields[0]), len(fields[0]) + len(fields[1])
    found: ApiKey = instance(ApiKey, rows[0][:first])
    found.owner = instance(user_model, rows[0][first:second])
    own = None if rows[0][second] is None else instance(SendingLimits, rows[0][second:])
    SendingLimits._meta.get_field("owner").remote_field.set_cached_value(found.owner, own)
    if not hmac.compare_digest(found.digest, digest):
        return None
    return found if found.owner.is_active and not found.revoked else None


def instance(model: Any, values: Sequence[Any]) -> Any:
    """A model instance from a row, as a QuerySet creates it: `values` in the fields' order."""
    fields = model._meta.concrete_fields
    converted = [
        field.from_db_value(value, None, connection) if hasattr(field, "from_db_value") else value
        for field, value in zip(fields, values, strict=True)
    ]
    return model.from_db(connection.alias, [field.attname for field in fields], converted)
