import json
import logging
from datetime import UTC, datetime

from emails.context import FIELDS, one_line


def ids(record: logging.LogRecord) -> dict[str, str]:
    """The ids of the request, email and delivery in a record."""
    found = {name.removesuffix("_id"): getattr(record, name, "") for name in FIELDS}
    return {name: str(value) for name, value in found.items() if value}


class OneLineFormatter(logging.Formatter):
    """Writes a record, including its traceback, as one line with the ids."""

    def format(self, record: logging.LogRecord) -> str:
        line = one_line(super().format(record))
        return " ".join([line, *(f"{name}={value}" for name, value in ids(record).items())])


class JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **ids(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class NoTraceback(logging.Filter):
    """Removes the traceback of requests for unknown hosts, because these are scans, not errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        return True
