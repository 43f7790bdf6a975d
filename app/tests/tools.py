"""Functions that several tests share."""

import os
from urllib.parse import urlsplit

from django.db import connection
from django.db.models import QuerySet
from django.db.models.functions import Now

from emails import deliveries
from emails.delivery_records import Claimed, Ended
from emails.models import Delivery
from emails.outcomes import Step
from emails.states import UNFINISHED, State


def due() -> QuerySet[Delivery]:
    """The deliveries that the relay would process now."""
    return Delivery.objects.filter(state__in=UNFINISHED, due_at__lte=Now()).order_by("due_at", "id")


def claim(delivery: Delivery) -> Claimed:
    (claimed,) = deliveries.claim([delivery.pk])
    return claimed


def begin(claimed: Claimed) -> bool:
    _, begun = deliveries.record([], [claimed])
    return begun == {claimed.id}


def end(claimed: Claimed, state: State, code: int | None = None, **more) -> bool:
    """Ends the attempt; returns False if another worker has the delivery."""
    step = Step(state, more.pop("wait", None), more.pop("failed_by", ""))
    seconds, answer = more.pop("seconds", 1), more.pop("answer", "")
    ended = Ended(claimed.id, claimed.number, step, code, answer, seconds, **more)
    done, _ = deliveries.record([ended])
    return done == {claimed.id}


def database_url() -> str:
    """The URL of the current test's database, for a separate process."""
    server = urlsplit(os.environ["TEST_DATABASE_URL"])
    return server._replace(path=f"/{connection.settings_dict['NAME']}").geturl()
