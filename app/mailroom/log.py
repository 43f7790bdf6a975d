import logging


class OneLineFormatter(logging.Formatter):
    """One line per record, tracebacks included; names the email where the record has one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).replace("\r", "").replace("\n", "\\n")
        email_id = getattr(record, "email_id", None)
        return f"{line} email={email_id}" if email_id else line
