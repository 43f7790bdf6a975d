"""Read by gunicorn from its working directory. Its command line wins."""

import logging
from typing import Any

from gunicorn.glogging import Logger

from emails.context import one_line

# Without the query and the referrer: what somebody searched for may be an address.
access_log_format = '%(h)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms request=%({x-request-id}o)s'


class OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class logger_class(Logger):  # noqa: N801 - the name of gunicorn's setting
    """Escapes what a client put into a path, so that it can't make a log entry of its own."""

    def _set_handler(
        self, log: Any, output: Any, fmt: logging.Formatter, stream: Any = None
    ) -> None:
        safe = OneLine(fmt._fmt, fmt.datefmt)
        super()._set_handler(log, output, safe, stream)
