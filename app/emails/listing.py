"""What the page and the API show to an owner."""

from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db.models import Count, Exists, OuterRef, Q, QuerySet
from django.utils import timezone

from emails.models import Delivery, Email, Suppression
from emails.states import State


def find(owner: Any, *, state: str | None = None, text: str = "") -> QuerySet[Email]:
    """The owner's emails that have a delivery in `state` and hold `text` where one would look."""
    found = Email.objects.filter(owner=owner)
    of_email = Delivery.objects.filter(email=OuterRef("pk"))
    if state:
        found = found.filter(Exists(of_email.filter(state=state)))
    if text := searchable(text):
        matches = Q(subject__icontains=text) | Q(Exists(of_email.filter(recipient__icontains=text)))
        with suppress(ValueError):
            matches |= Q(pk=UUID(text))
        found = found.filter(matches)
    return found


def find_suppressions(owner: Any, text: str = "") -> QuerySet[Suppression]:
    """The addresses to which the owner sends nothing, with `text` in them."""
    return Suppression.objects.filter(owner=owner, address__icontains=searchable(text))


def searchable(text: str) -> str:
    return "".join(character for character in text.strip() if character.isprintable())


def count_by_state(owner: Any, hours: int = 24) -> dict[str, int]:
    """How many of the owner's deliveries of the last hours are in each state."""
    since = timezone.now() - timedelta(hours=hours)
    counts = (
        Delivery.objects.filter(email__owner=owner, email__created_at__gt=since)
        .values_list("state")
        .annotate(Count("pk"))
        .order_by()
    )
    return {state.value: dict(counts).get(state.value, 0) for state in State}
