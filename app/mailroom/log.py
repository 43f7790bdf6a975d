import json
import logging
from datetime import UTC, datetime

from emails.context import FIELDS, one_line


def ids(record: logging.LogRecord) -> dict[str, str]:
    """The ids that the record has: of the request, the email, the delivery."""
    found = {name.removesuffix("_id"): getattr(record, name, "") for name in FIELDS}
    return {name: str(value) for name, value in found.items() if value}


class OneLineFormatter(logging.Formatter):
    """One line per record, tracebacks included; names the request and the email it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        line = one_line(super().format(record))
        return " ".join([line, *(f"{name}={value}" for name, value in ids(record).items())])


class JsonFormatter(logging.Formatter):
    """The same as an object of JSON."""

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
    """A request for an unknown host is somebody's probe, not a fault to trace."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        return True
