from typing import Any
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError, CommandParser

from emails import services
from emails.models import NEEDS_OPERATOR, Delivery


class Command(BaseCommand):
    help = (
        "Lists failed deliveries and held uncertain ones, with the email and SMTP code. With "
        "--send, retries them with a new deadline."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("emails", nargs="*", metavar="ID", help="only these emails")
        parser.add_argument("--state", choices=["failed", "uncertain"])
        parser.add_argument("--send", action="store_true")

    def handle(self, *, emails: list[str], state: str | None, send: bool, **_: Any) -> None:
        chosen = Delivery.objects.filter(NEEDS_OPERATOR)
        if state:
            chosen = chosen.filter(state=state)
        if emails:
            try:
                chosen = chosen.filter(email__in=[UUID(email) for email in emails])
            except ValueError:
                raise CommandError("ID: expected the id of an email") from None
        if send:
            self.stdout.write(f"{services.replay(chosen)} deliveries queued for retry")
            return
        for delivery in chosen.order_by("pk").iterator():
            self.stdout.write(
                f"{delivery.email_id} delivery={delivery.pk} {delivery.state}"
                f" attempts={delivery.attempts} code={delivery.last_smtp_code or '-'}"
            )
