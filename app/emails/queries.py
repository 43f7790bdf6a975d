"""Runs the named statements of emails/sql/ on PostgreSQL.

psycopg prepares the statements, so the server plans each one once per connection. This halves the
cost of an email. The lookups are by key, so one plan suits all values.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, Self

import psycopg
from django.db import NotSupportedError, connection

Row = tuple[Any, ...]


def load(filename: str) -> dict[str, str]:
    """The statements of a file in emails/sql/, by the names in its `-- name:` lines."""
    text = (resources.files("emails") / "sql" / filename).read_text()
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@contextmanager
def execute(statement: str, values: Any = None, *, prepare: bool | None = None) -> Iterator[Any]:
    """Runs the statement; yields the cursor.

    With `prepare=False`, the server plans each execution.
    """
    try:
        cursor = _run(statement, values, prepare)
    except NotSupportedError:
        # A migration has changed a column's type since the statement was planned, so the statement
        # did not run.
        if connection.in_atomic_block:
            raise
        connection.close()
        cursor = _run(statement, values, prepare)
    with cursor:
        yield cursor


def fetch(statement: str, values: Any = None, *, prepare: bool | None = None) -> list[Row]:
    """Runs the statement; returns its rows."""
    with execute(statement, values, prepare=prepare) as cursor:
        rows: list[Row] = cursor.fetchall()
        return rows


class _Cursor(psycopg.Cursor[Row]):
    """Sends values as parameters, separate from the statement.

    Django's cursor would put the values into the text, so the server would plan each execution.
    """

    prepare: bool | None = None

    def execute(self, query: Any, params: Any = None, **_: Any) -> Self:
        return super().execute(query, params, prepare=self.prepare)


def _run(statement: str, values: Any, prepare: bool | None) -> Any:
    cursor: Any = connection.cursor()
    cursor.cursor = _Cursor(cursor.connection)  # Django's wrapper translates its errors
    cursor.cursor.prepare = prepare
    cursor.execute(statement, values)
    return cursor
