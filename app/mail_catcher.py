"""A mail server for development that keeps what it gets, and shows it on a page.

python mail_catcher.py SMTP_PORT PAGE_PORT
"""

import email
import email.policy
import html
import sys
import threading
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

PAGE = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<title>Mail ({count})</title>
<style>body {{ font: 1rem system-ui; margin: 2rem auto; max-width: 50rem; padding: 0 1rem }}
article {{ border-top: 1px solid #8888; padding: .5rem 0 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }}</style><h1>Mail ({count})</h1>{mails}"""
MAIL = "<article><h2>{subject}</h2><p>From {sender} to {recipients}</p><pre>{text}</pre></article>"
MOST = 200  # mails that are kept


class Catcher:
    """Mails, the newest first."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], EmailMessage]] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content or b""
        data = content if isinstance(content, bytes) else content.encode()
        message = email.message_from_bytes(data, policy=email.policy.default)
        self.mails = [(envelope.rcpt_tos, message), *self.mails][:MOST]
        return "250 accepted"

    def page(self) -> str:
        mails = []
        for recipients, message in self.mails:
            body = message.get_body(("plain", "html"))
            fields = {
                "subject": message["Subject"] or "",
                "sender": message["From"] or "",
                "recipients": ", ".join(recipients),
                "text": body.get_content() if body else "",
            }
            mails.append(MAIL.format(**{name: html.escape(str(v)) for name, v in fields.items()}))
        return PAGE.format(count=len(mails), mails="".join(mails) or "<p>Nothing yet.</p>")


def main(smtp_port: int, page_port: int) -> None:
    catcher = Catcher()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(catcher.page().encode())

        def log_message(self, *_: object) -> None:
            pass

    server = Controller(catcher, hostname="127.0.0.1", port=smtp_port)
    server.start()
    pages = ThreadingHTTPServer(("127.0.0.1", page_port), Page)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
