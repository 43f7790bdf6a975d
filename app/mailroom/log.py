import json
import logging
from datetime import UTC, datetime

from emails.context import FIELDS


def ids(record: logging.LogRecord) -> dict[str, str]:
    """The ids that the record has: of the request, the email, the delivery."""
    found = {name.removesuffix("_id"): getattr(record, name, "") for name in FIELDS}
    return {name: str(value) for name, value in found.items() if value}


class OneLineFormatter(logging.Formatter):
    """One line per record, tracebacks included; names the request and the email it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).replace("\r", "").replace("\n", "\\n")
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
