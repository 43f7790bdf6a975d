"""Tests a worker with a message for several deliveries: chunks, a lost database, and kills."""

import os
import subprocess
import sys
from datetime import timedelta
from unittest.mock import Mock

import pytest
from celery.exceptions import Reject
from django.conf import settings as django_settings
from django.db import InterfaceError, OperationalError, connection, transaction
from django.utils import timezone

from emails import deliveries, delivering, services
from emails.delivering import CHUNK_SECONDS, DATABASE_PAUSES, LARGEST_CHUNK, Sender
from emails.models import Attempt, Delivery
from emails.states import State
from emails.tasks import deliver, send_email
from tests.tools import claim, database_url, due

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def pace(monkeypatch):
    """Resets the pace, which another test's server may have set."""
    monkeypatch.setattr(Sender, "pace", float("inf"))


@pytest.fixture
def chunks_of(monkeypatch):
    def chunks_of(size: int) -> None:
        monkeypatch.setattr(Sender, "chunk_size", classmethod(lambda cls: size))

    return chunks_of


@pytest.fixture
def several(accept):
    """Returns the ids of the given number of deliveries, in the order in which they are sent."""
    return lambda count: [accept().deliveries.get().pk for _ in range(count)]


@pytest.fixture
def recorded(monkeypatch):
    """How many attempts each statement ends and begins."""
    calls, record = [], deliveries.record

    def note(ended, begin=()):
        calls.append((len(ended), len(begin)))
        return record(ended, begin)

    monkeypatch.setattr(deliveries, "record", note)
    return calls


def states() -> list[str]:
    return list(Delivery.objects.order_by("pk").values_list("state", flat=True))


# ---- Chunks ----


@pytest.mark.parametrize(
    ("pace", "size"),
    [
        (float("inf"), 1),  # the last one was not sent
        (CHUNK_SECONDS * 2, 1),
        (CHUNK_SECONDS / 2, 2),
        (CHUNK_SECONDS / LARGEST_CHUNK, LARGEST_CHUNK),
        (0.000001, LARGEST_CHUNK),
        (0, 1),
    ],
)
def test_chunk_takes_a_quarter_of_a_second(settings, monkeypatch, pace, size):
    monkeypatch.setattr(Sender, "pace", pace)
    assert Sender.chunk_size() == size
    settings.EMAILS_UNCERTAIN_POLICY = "hold"
    assert Sender.chunk_size() == 1


def test_outcomes_of_a_chunk_are_recorded_when_the_next_begins(
    several, mailbox, chunks_of, recorded
):
    chunks_of(3)
    deliver(*several(7))
    assert recorded == [(0, 3), (3, 3), (3, 1), (1, 0)]
    assert states() == [State.SENT] * 7


def test_refusal_is_recorded_at_once_and_ends_the_chunks(several, mailbox, monkeypatch, recorded):
    ids = several(4)
    monkeypatch.setattr(Sender, "pace", 0.001)
    mailbox.replies = ["250 taken", "451 later", "451 later", "451 later"]
    deliver(*ids)
    # All four begin together. After the first refusal, each attempt is recorded immediately.
    assert recorded == [(0, 4), (2, 0), (1, 0), (1, 0)]
    assert Sender.pace == float("inf")
    assert states() == [State.SENT] + [State.DEFERRED] * 3


def test_with_the_policy_hold_only_the_sent_delivery_is_marked(
    several, mailbox, settings, monkeypatch, recorded
):
    settings.EMAILS_UNCERTAIN_POLICY = "hold"
    monkeypatch.setattr(Sender, "pace", 0.001)
    deliver(*several(2))
    assert recorded == [(0, 1), (1, 0), (0, 1), (1, 0)]


def test_marked_deliveries_that_were_not_sent_are_requeued(several, mailbox, chunks_of, settings):
    """There is time for one email.

    The other deliveries in its chunk are queued again, and never become uncertain.
    """
    chunks_of(3)
    settings.EMAILS_SENDING_LEASE_SECONDS = 0
    first, *others = several(3)
    deliveries.lease(3)
    deliver(first, *others)
    assert len(mailbox.messages) == 1
    assert states() == [State.SENT, State.QUEUED, State.QUEUED]
    assert [each.pk for each in due()] == others
    given_back = Delivery.objects.filter(pk__in=others)
    assert set(given_back.values_list("attempts", "data_sent", "published_at")) == {
        (0, False, None)
    }
    settings.EMAILS_SENDING_LEASE_SECONDS = 60
    deliver(*others)
    assert states() == [State.SENT] * 3
    assert len(mailbox.messages) == 3


# ---- The deadline ----


def test_uncertain_delivery_is_held_at_its_deadline(delivery, mailbox):
    mailbox.reply = None
    Delivery.objects.update(expires_at=timezone.now() + timedelta(seconds=10))
    deliver(delivery.pk)
    delivery.refresh_from_db()
    assert (delivery.state, delivery.due_at) == (State.UNCERTAIN, None)


# ---- The database ----


def end_session() -> None:
    """Terminates the session, as a restart of the server does."""
    other = connection.copy()
    with other.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(%s, 5000)", [connection.connection.info.backend_pid]
        )
    other.close()


@pytest.fixture
def lose_session(monkeypatch):
    """Terminates the session at the n-th call of a function of emails.deliveries."""

    def lose_session(name: str, number: int, *, after: bool = False) -> None:
        act, calls = getattr(deliveries, name), []

        def act_without_session(*arguments):
            calls.append(arguments)
            if len(calls) != number:
                return act(*arguments)
            if after:  # committed, but the response is lost
                act(*arguments)
            end_session()
            return act(*arguments)

        monkeypatch.setattr(deliveries, name, act_without_session)

    return lose_session


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("name", "number"),
    [("claim", 1), ("claim", 2), ("record", 3)],
    ids=["first claim", "second claim", "the last outcomes"],
)
def test_lost_session_costs_no_attempt(several, mailbox, chunks_of, lose_session, name, number):
    chunks_of(2)
    ids = several(4)
    lose_session(name, number)
    deliver(*ids)
    assert states() == [State.SENT] * 4
    assert len(mailbox.messages) == 4
    assert sorted(Attempt.objects.values_list("delivery_id", "number")) == [(pk, 1) for pk in ids]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("after", [False, True], ids=["not committed", "committed"])
def test_session_lost_at_the_beginning_of_a_chunk_causes_no_duplicate(
    several, mailbox, monkeypatch, lose_session, after
):
    """The previous chunk's outcomes are recorded, and the affected email is retried."""
    monkeypatch.setattr(Sender, "chunk_size", classmethod(lambda cls: 2 if cls.pace < 1 else 1))
    Sender.pace = 0.001
    ids = several(4)
    lose_session("record", 2, after=after)
    deliver(*ids)
    assert states() == [State.SENT, State.SENT, State.DEFERRED, State.SENT]
    assert len(mailbox.messages) == 3
    assert sorted(Attempt.objects.values_list("delivery_id", "number")) == [(pk, 1) for pk in ids]
    Delivery.objects.filter(state=State.DEFERRED).update(state=State.QUEUED)
    deliver(*ids)
    assert states() == [State.SENT] * 4
    assert len(mailbox.messages) == 4


@pytest.mark.parametrize("error", [OperationalError("away"), InterfaceError("away")])
@pytest.mark.parametrize(
    ("task", "arguments"),
    [(deliver, [1]), (send_email, ["Hello", "Body", None, "bob@example.org"])],
    ids=["deliver", "send_email"],
)
def test_message_is_requeued_while_the_database_is_down(monkeypatch, task, arguments, error):
    away = Mock(side_effect=error)
    monkeypatch.setattr(delivering, "DATABASE_PAUSES", ())
    monkeypatch.setattr(deliveries, "claim", away)
    monkeypatch.setattr(services, "accept", away)
    with pytest.raises(Reject) as rejection:
        task(*arguments)
    away.assert_called_once()
    assert rejection.value.requeue


def test_waiting_for_the_database_ends(monkeypatch):
    act, sleep = Mock(side_effect=OperationalError("away")), Mock()
    session = Mock(in_atomic_block=False)
    monkeypatch.setattr(delivering, "connection", session)
    monkeypatch.setattr(delivering.time, "sleep", sleep)
    with pytest.raises(OperationalError):
        delivering.retry_while_database_down(act)
    assert act.call_count == len(DATABASE_PAUSES) + 1
    assert [call.args[0] for call in sleep.call_args_list] == list(DATABASE_PAUSES)
    assert session.close.call_count == len(DATABASE_PAUSES), "each retry must reconnect"


def test_transaction_is_not_partially_retried(db):
    act = Mock(side_effect=OperationalError("away"))
    with pytest.raises(OperationalError), transaction.atomic():
        delivering.retry_while_database_down(act)
    act.assert_called_once()


# ---- A kill ----

WORKER = """
import sys
import django; django.setup()
from emails.delivering import Sender
from emails.tasks import deliver, send_email
Sender.pace = 0.0001
deliver(*map(int, sys.argv[1:]))
"""


@pytest.mark.django_db(transaction=True)
def test_killed_worker_leaves_at_most_one_chunk_uncertain(several, mailbox, settings):
    ids = several(LARGEST_CHUNK + 10)
    deliveries.lease(len(ids))
    mailbox.gate.clear()
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, ids)],
        cwd=django_settings.BASE_DIR,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "mailroom.settings",
            "DATABASE_URL": database_url(),
            "EMAIL_URL": f"smtp://127.0.0.1:{settings.EMAIL_PORT}",
            "EMAIL_TIMEOUT": "30",
        },
    )
    try:
        assert mailbox.waiting.wait(timeout=30)
    finally:
        worker.kill()
        worker.wait()
    mailbox.gate.set()
    Delivery.objects.update(due_at=timezone.now() - timedelta(seconds=1))
    leased = deliveries.lease(len(ids)).deliveries
    assert states() == [State.UNCERTAIN] * LARGEST_CHUNK + [State.QUEUED] * 10
    assert [each.id for each in leased] == ids[LARGEST_CHUNK:]
    # All emails are sent eventually.
    Delivery.objects.update(due_at=timezone.now() - timedelta(seconds=1))
    deliveries.lease(len(ids))
    deliver(*ids)
    assert states() == [State.SENT] * len(ids)


def test_worker_killed_between_claim_and_data_makes_nothing_uncertain(several):
    ids = several(3)
    for pk in ids:
        claim(Delivery(pk=pk))
    Delivery.objects.update(due_at=timezone.now() - timedelta(seconds=1))
    deliveries.lease(3)
    assert states() == [State.DEFERRED] * 3
