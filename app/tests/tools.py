"""Functions that several tests share."""

import os
import socket
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from django.db import connection
from django.db.models import QuerySet
from django.db.models.functions import Now

from emails import deliveries
from emails.delivery_records import Claimed, Ended
from emails.models import Delivery
from emails.outcomes import Step
from emails.states import UNFINISHED, State

T = TypeVar("T")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def eventually(check: Callable[[], T], seconds: float = 30) -> T:
    """Repeats `check` until it returns a true value; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := check():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds: {check.__name__}")


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
