"""The lists and counts for the web page and the API."""

from contextlib import suppress
from typing import Any
from uuid import UUID

from django.db.models import Count, Exists, OuterRef, Q, QuerySet

from emails.models import Delivery, Email, Suppression
from emails.states import State

# Counting stops at this number. For a page of 20, it is enough to know that there are more.
COUNT_LIMIT = 100


def find(owner: Any, *, state: str | None = None, text: str = "") -> QuerySet[Email]:
    """The owner's emails with a delivery in `state`, and with `text` in the subject or a recipient
    or as the id."""
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
    """The owner's suppressed addresses that contain `text`."""
    return Suppression.objects.filter(owner=owner, address__icontains=searchable(text))


def searchable(text: str) -> str:
    return "".join(character for character in text.strip() if character.isprintable())


def count_by_state(owner: Any, text: str = "") -> dict[str, int | None]:
    """How many emails `find` returns for each state; "" is for all states.

    COUNT_LIMIT + 1 means more than COUNT_LIMIT. If more than COUNT_LIMIT emails match `text`, the
    counts of states are None, because counting would take too long.
    """

    # The query has no order, so that the database can start with a rare state or the owner's
    # emails.
    def bounded(emails: QuerySet[Email]) -> QuerySet[Email]:
        return emails.order_by()[: COUNT_LIMIT + 1]

    if not text:
        return {state: bounded(find(owner, state=state)).count() for state in ("", *State.values)}
    # If few emails match, a search reads all of the owner's emails. So all counts use one
    # search.
    matching = list(bounded(find(owner, text=text)).values_list("pk", flat=True))
    counts: dict[str, int | None] = {"": len(matching)}
    if len(matching) > COUNT_LIMIT:
        return counts | dict.fromkeys(State.values)
    of_state = dict(
        Delivery.objects.filter(email__in=matching)
        .values_list("state")
        .annotate(Count("email", distinct=True))
        .order_by()
    )
    return counts | {state: of_state.get(state, 0) for state in State.values}
