"""The ids in the log records of a request, a publication or a task."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

FIELDS = ("request_id", "email_id", "delivery_id")

_ids: ContextVar[dict[str, str]] = ContextVar("ids", default={})  # noqa: B039 - never changed in place


@contextmanager
def bind(**ids: Any) -> Iterator[None]:
    token = _ids.set(_ids.get() | {name: str(value) for name, value in ids.items() if value})
    try:
        yield
    finally:
        _ids.reset(token)


def get(name: str) -> str:
    return _ids.get().get(name, "")


def one_line(text: str) -> str:
    """The text with unprintable characters escaped, such as line breaks and terminal codes."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


class AddIds(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        for name in FIELDS:
            if not hasattr(record, name):
                setattr(record, name, get(name))
        return True
