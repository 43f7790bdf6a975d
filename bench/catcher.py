"""An SMTP server with faults, for the measurements: python bench/catcher.py PORT LOG [DELAY]

What becomes of a message is decided by the first word of its recipient's address: slow-, later- (451 the first time), refused-
(550), before- (the connection ends before DATA, the first time), after- (the message is taken and the connection ends without an
answer, the first time); all others are taken. Each message taken is a line of LOG: time, Message-ID, recipient.
"""

from __future__ import annotations

import asyncio
import sys
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
        # As the mail servers in use do; Python's own client makes no use of it.
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


async def serve(port: int, path: str, delay: float) -> None:
    with open(path, "a", buffering=1) as log:
        handler = Handler(log, delay)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: SMTP(handler, enable_SMTPUTF8=True, ident="catcher"), "127.0.0.1", port)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0))
