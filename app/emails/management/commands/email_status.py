import json
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand
from django.db.models import Count, Min
from django.utils import timezone

from emails.metrics import seconds_since
from emails.models import NEEDS_OPERATOR, Delivery
from emails.states import UNFINISHED, State


class Command(BaseCommand):
    help = (
        "Prints JSON: the numbers of deliveries of the last 24 hours by state, the number that"
        " failed or are held, and the ages in seconds of the oldest unsent and of the oldest due"
        " delivery."
    )

    def handle(self, **_: Any) -> None:
        now = timezone.now()
        recent = Delivery.objects.filter(email__created_at__gte=now - timedelta(days=1))
        states = dict(recent.values_list("state").annotate(Count("pk")).order_by())
        unfinished = Delivery.objects.filter(state__in=UNFINISHED)
        # Scheduled emails and held deliveries don't wait for a worker.
        unsent = unfinished.exclude(state=State.SCHEDULED).exclude(NEEDS_OPERATOR)
        oldest = unsent.aggregate(at=Min("email__created_at"))["at"]
        due = unfinished.filter(due_at__lte=now).aggregate(at=Min("due_at"))["at"]
        status = {
            "states": {state.value: states.get(state, 0) for state in State},
            "needs_operator": Delivery.objects.filter(NEEDS_OPERATOR).count(),
            "oldest_unsent_seconds": round(seconds_since(oldest)),
            "oldest_due_seconds": round(seconds_since(due)),
        }
        self.stdout.write(json.dumps(status))
