import signal
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from emails.publisher import Publisher
from emails.relay import Relay


class Command(BaseCommand):
    help = "Publishes due deliveries to the broker until it is stopped (SIGTERM or SIGINT)."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--once", action="store_true", help="publish what is due, then exit")

    def handle(self, *, once: bool, **_: Any) -> None:
        if once:
            publisher = Publisher()
            try:
                while publisher.publish_due():
                    pass
            except Exception as error:
                raise CommandError(f"not published: {error}") from error
            finally:
                publisher.discard_connection()
            return
        relay = Relay()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: relay.stop())
        relay.run()
