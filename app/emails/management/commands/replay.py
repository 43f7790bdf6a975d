from uuid import UUID

from django.core.management.base import BaseCommand, CommandError

from emails.models import DEAD, Delivery
from emails.services import wake_relay


class Command(BaseCommand):
    help = (
        "Lists deliveries that ended without success (failed, or uncertain and held back), by "
        "email and SMTP code; with --send sends them once more, with a new deadline."
    )

    def add_arguments(self, parser) -> None:
        parser.add_argument("emails", nargs="*", metavar="ID", help="of these emails; default: all")
        parser.add_argument("--state", choices=["failed", "uncertain"])
        parser.add_argument("--send", action="store_true")

    def handle(self, *, emails: list[str], state: str | None, send: bool, **_) -> None:
        dead = Delivery.objects.filter(DEAD)
        if state:
            dead = dead.filter(state=state)
        if emails:
            try:
                dead = dead.filter(email__in=[UUID(email) for email in emails])
            except ValueError:
                raise CommandError("ID: expected the id of an email") from None
        if send:
            self.stdout.write(f"sends {dead.replay()} once more")
            wake_relay()
            return
        for delivery in dead.order_by("pk").iterator():
            self.stdout.write(
                f"{delivery.email_id} delivery={delivery.pk} {delivery.state}"
                f" attempts={delivery.attempts} code={delivery.last_smtp_code or '-'}"
            )
