"""A mail server that delivers nothing: python -m dev.mail_catcher SMTP_PORT PAGE_PORT

The server keeps the latest messages in memory and shows them on a web page.
"""

import sys
from collections import deque
from email import message_from_bytes, policy
from email.message import EmailMessage
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any, NamedTuple

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

HOST = "127.0.0.1"
KEPT = 500
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>{head}<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 2rem; }}
th, td {{ padding: .2rem 1.5rem .2rem 0; text-align: left; vertical-align: top; }}
pre {{ white-space: pre-wrap; }}
</style></head><body><h1>{title}</h1>{body}</body></html>"""


class Mail(NamedTuple):
    number: int
    recipients: str
    message: EmailMessage


class Catcher:
    def __init__(self) -> None:
        self.mails: deque[Mail] = deque(maxlen=KEPT)
        self.numbers = count(1)

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        message = message_from_bytes(envelope.original_content or b"", policy=policy.default)
        mail = Mail(next(self.numbers), ", ".join(envelope.rcpt_tos), message)
        self.mails.appendleft(mail)
        print(f"{mail.number}: {message['subject']!r} to {mail.recipients}", flush=True)
        return "250 kept"

    def list(self) -> str:
        rows = "".join(
            f'<tr><td>{number}<td><a href="/{number}">{escape(message["subject"] or "(none)")}</a>'
            f"<td>{escape(message['from'] or '')}<td>{escape(recipients)}"
            for number, recipients, message in tuple(self.mails)
        )
        table = f"<table><tr><th><th>Subject<th>From<th>Recipients{rows}</table>"
        refresh = '<meta http-equiv="refresh" content="3">'
        return PAGE.format(title="Mail", head=refresh, body=table if rows else "<p>None yet.</p>")

    def show(self, mail: Mail) -> str:
        headers = [("Recipients", mail.recipients), *mail.message.items()]
        rows = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in headers)
        parts = "".join(
            f"<h2>{escape(part.get_content_type())}</h2>{content(part)}"
            for part in mail.message.walk()
            if not part.is_multipart()
        )
        body = f'<p><a href="/">All</a></p><table>{rows}</table>{parts}'
        return PAGE.format(title=escape(mail.message["subject"] or "(none)"), head="", body=body)


def content(part: EmailMessage) -> str:
    """A part as HTML: its text, the source of HTML, or the name and size of an attachment."""
    data = part.get_payload(decode=True) or b""
    if part.get_content_maintype() == "text" and not part.is_attachment():
        return f"<pre>{escape(data.decode('utf-8', 'replace'))}</pre>"
    return f"<p>{escape(part.get_filename() or 'no name')}, {len(data)} bytes</p>"


def page_handler(catcher: Catcher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mails = {f"/{mail.number}": mail for mail in tuple(catcher.mails)}
            if self.path != "/" and self.path not in mails:
                return self.send_error(404)
            page = catcher.list() if self.path == "/" else catcher.show(mails[self.path])
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode("utf-8", "replace"))

        def log_message(self, *_: Any) -> None:
            """Logs no requests, because the page reloads itself every few seconds."""

    return Handler


if __name__ == "__main__":
    smtp_port, page_port = map(int, sys.argv[1:])
    catcher = Catcher()
    Controller(catcher, hostname=HOST, port=smtp_port).start()
    ThreadingHTTPServer((HOST, page_port), page_handler(catcher)).serve_forever()
