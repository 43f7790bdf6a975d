"""Settings of gunicorn, which reads this file from its working directory. Options override them."""

import logging
from typing import Any

from gunicorn.glogging import Logger

from emails.context import one_line

# The format has no query string and no referrer, because search terms may be addresses.
access_log_format = '%(h)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms request=%({x-request-id}o)s'


class OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class logger_class(Logger):  # noqa: N801 - the name of gunicorn's setting
    """Escapes the request's path, so that a client can't forge log entries."""

    def _set_handler(
        self, log: Any, output: Any, fmt: logging.Formatter, stream: Any = None
    ) -> None:
        safe = OneLine(fmt._fmt, fmt.datefmt)
        super()._set_handler(log, output, safe, stream)
