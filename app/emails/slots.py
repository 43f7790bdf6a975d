"""EMAILS_SMTP_CONNECTIONS: the maximum number of SMTP connections of all workers together."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from django.db import OperationalError, connection
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.errors import LockNotAvailable

from emails import smtp
from emails.conf import conf
from emails.queries import load

SQL = load("emails.sql")
# How long to wait for one slot before trying all slots again.
WAIT_SECONDS = 0.5

_own = threading.local()


@contextmanager
def smtp_slot(patience: float) -> Iterator[bool]:
    """Holds a slot for an SMTP connection; yields False if none is free within `patience` seconds.

    The slot is an advisory lock in a transaction of a separate database connection, so PostgreSQL
    frees it as soon as the process dies. The SMTP connection is closed with the slot.
    """
    limit = conf.SMTP_CONNECTIONS
    if not limit:
        yield True
        return
    database = _database()
    try:
        database.set_autocommit(False)
        deadline = time.monotonic() + patience
        while not (taken := _take(database, limit)) and time.monotonic() < deadline:
            pass
        try:
            yield taken
        finally:
            smtp.close()
        database.rollback()
        database.set_autocommit(True)
    except BaseException:
        database.close()
        raise


def _database() -> BaseDatabaseWrapper:
    if not hasattr(_own, "database"):
        _own.database = connection.copy()
    database: BaseDatabaseWrapper = _own.database
    database.close_if_unusable_or_obsolete()
    return database


def _take(database: BaseDatabaseWrapper, limit: int) -> bool:
    """Takes a free slot, or waits for one; returns whether it got a slot."""
    with database.cursor() as cursor:
        cursor.execute(SQL["take_slot"], (limit,))
        if cursor.fetchone() is not None:
            return True
        slot = random.randint(1, limit)  # noqa: S311 - spreads the waiting workers, no cryptography
        try:
            cursor.execute(SQL["wait_for_slot"], (f"{WAIT_SECONDS * 1000:.0f}ms", slot))
        except OperationalError as error:
            if not isinstance(error.__cause__, LockNotAvailable):
                raise
            database.rollback()
            return False
        return True
