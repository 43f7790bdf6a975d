"""An SMTP server that simulates faults: python bench/smtp_sink.py PORT LOG [--delay SECONDS] [--connections MOST]

The first word of the recipient's address selects the fault: slow- (the reply takes a second), later- (451 the first time),
refused- (550), before- (the connection is closed before DATA, the first time), after- (the message is accepted and the connection
is closed without a reply, the first time). All other messages are accepted. LOG gets a line per accepted message: time,
Message-ID, recipient. With --connections, the server replies 421 to a connection beyond MOST, closes it, and prints a line.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from email.parser import BytesHeaderParser

from aiosmtpd.smtp import SMTP

PARSE = BytesHeaderParser()


class Handler:
    def __init__(self, log, delay: float) -> None:
        self.log = log
        self.delay = delay
        self.seen = set()

    def first_time(self, address: str) -> bool:
        new = address not in self.seen
        self.seen.add(address)
        return new

    async def handle_EHLO(self, server, session, envelope, hostname, responses):
        session.host_name = hostname
        greeting, *offers = responses
        # Most mail servers offer PIPELINING; Python's client does not use it.
        return [greeting, "250-PIPELINING", *offers]

    async def handle_RCPT(self, server, session, envelope, address, options):
        fault = address.partition("-")[0]
        if fault == "refused":
            return "550 no such user"
        if fault == "later" and self.first_time(address):
            return "451 try again later"
        if fault == "before" and self.first_time(address):
            server.transport.abort()
            return "421 gone"
        envelope.rcpt_tos.append(address)
        return "250 fine"

    async def handle_DATA(self, server, session, envelope):
        (address,) = envelope.rcpt_tos
        fault = address.partition("-")[0]
        await asyncio.sleep(1 if fault == "slow" else self.delay)
        message_id = PARSE.parsebytes(envelope.content)["Message-ID"]
        self.log.write(f"{time.time():.4f} {message_id} {address}\n")
        if fault == "after" and self.first_time(address):
            server.transport.abort()
        return "250 taken"


class LimitedSMTP(SMTP):
    """Refuses connections while `most` others are open."""

    open = 0
    most: int | None = None

    def connection_made(self, transport) -> None:
        self.counted = self.most is None or LimitedSMTP.open < self.most
        if not self.counted:
            print("421 too many connections", flush=True)
            transport.write(b"421 4.7.0 too many connections\r\n")
            transport.close()
            return
        LimitedSMTP.open += 1
        super().connection_made(transport)

    def connection_lost(self, error) -> None:
        if self.counted:
            LimitedSMTP.open -= 1
            super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.counted:
            super().data_received(data)

    def eof_received(self) -> bool | None:
        return super().eof_received() if self.counted else None


async def serve(port: int, path: str, delay: float) -> None:
    with open(path, "a", buffering=1) as log:
        handler = Handler(log, delay)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: LimitedSMTP(handler, enable_SMTPUTF8=True, ident="sink"), "127.0.0.1", port)
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("log")
    parser.add_argument("--delay", type=float, default=0, help="seconds before the reply to a message")
    parser.add_argument("--connections", type=int, help="maximum of open connections")
    options = parser.parse_args()
    LimitedSMTP.most = options.connections
    asyncio.run(serve(options.port, options.log, options.delay))
