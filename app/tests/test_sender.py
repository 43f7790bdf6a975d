"""How a worker sends the deliveries of one message: chunks, outcomes, and a database that goes."""

from datetime import timedelta

import pytest
from celery.exceptions import Reject
from django.db import OperationalError, connection
from django.utils import timezone

from emails import deliveries, delivering
from emails.delivering import LARGEST_CHUNK, Sender, retry_while_database_down
from emails.models import Delivery
from emails.states import State
from emails.tasks import deliver
from tests.tools import due

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def unknown_pace(monkeypatch):
    monkeypatch.setattr(Sender, "pace", float("inf"))


@pytest.fixture
def ids(accept):
    return [accept().deliveries.get().pk for _ in range(12)]


@pytest.fixture
def statements(monkeypatch):
    """What the worker asks the database: the name and how many deliveries, or (ended, begun)."""
    calls = []
    claim, record = deliveries.claim, deliveries.record

    def noted_claim(ids):
        calls.append(("claim", len(ids)))
        return claim(ids)

    def noted_record(ended, begin=()):
        calls.append(("record", len(ended), len(begin)))
        return record(ended, begin)

    monkeypatch.setattr(deliveries, "claim", noted_claim)
    monkeypatch.setattr(deliveries, "record", noted_record)
    return calls


@pytest.mark.parametrize(
    ("pace", "policy", "size"),
    [
        (float("inf"), "resend", 1),
        (1.0, "resend", 1),
        (0.1, "resend", 2),
        (0.05, "resend", 5),
        (0.001, "resend", LARGEST_CHUNK),
        (0.001, "hold", 1),
    ],
)
def test_a_chunk_is_what_the_server_takes_in_a_quarter_of_a_second(settings, pace, policy, size):
    settings.EMAILS_UNCERTAIN_POLICY = policy
    Sender.pace = pace
    assert Sender.chunk_size() == size


def test_a_fast_server_costs_few_statements(ids, mailbox, statements, monkeypatch):
    monkeypatch.setattr(Sender, "chunk_size", classmethod(lambda cls: 5))
    deliver(*ids)
    assert statements == [
        *(("claim", 5), ("record", 0, 5)),
        *(("claim", 5), ("record", 5, 5)),
        *(("claim", 2), ("record", 5, 2)),
        ("record", 2, 0),
    ]
    assert set(Delivery.objects.values_list("state", flat=True)) == {State.SENT}


def test_after_a_failure_the_next_is_alone(ids, mailbox):
    Sender.pace = 0.001
    mailbox.replies = ["451 later"]
    deliver(ids[0])
    assert Sender.chunk_size() == 1


def test_a_worker_that_dies_leaves_as_many_uncertain_as_a_chunk(ids, mailbox, monkeypatch):
    monkeypatch.setattr(Sender, "chunk_size", classmethod(lambda cls: 5))

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    mailbox.replies = ["250 taken"] * 3
    result, sent = Sender.result, []

    def result_then_die(self, claimed):
        sent.append(claimed[0].id)
        return die() if len(sent) == 4 else result(self, claimed)

    monkeypatch.setattr(Sender, "result", result_then_die)
    with pytest.raises(Killed):
        delivering.deliver(ids)
    Delivery.objects.filter(state=State.SENDING).update(due_at="2020-01-01T00:00Z")
    deliveries.lease(50)
    uncertain = Delivery.objects.filter(uncertain_attempts=1)
    assert uncertain.count() == 5
    assert set(sent[:3]) < {each.pk for each in uncertain}


def test_time_that_runs_out_gives_the_rest_back_unsent(ids, mailbox, monkeypatch, settings):
    monkeypatch.setattr(Sender, "chunk_size", classmethod(lambda cls: 5))
    settings.EMAILS_SENDING_LEASE_SECONDS = 0
    deliver(*ids)
    assert len(mailbox.messages) == 1
    rest = due()
    assert {delivery.pk for delivery in rest} == set(ids[1:])
    assert {(each.attempts, each.data_sent) for each in rest} == {(0, False)}


# A database that goes away


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(delivering, "DATABASE_PAUSES", (0, 0, 0))


@pytest.mark.django_db(transaction=True)
def test_a_broken_connection_is_replaced(no_pauses):
    broken = []

    def act() -> int:
        with connection.cursor() as cursor:
            if not broken:
                broken.append(connection.connection)
                connection.connection.close()
            cursor.execute("SELECT 1")
            return cursor.fetchone()[0]

    assert retry_while_database_down(act) == 1
    assert connection.connection is not broken[0]


@pytest.mark.django_db(transaction=True)
def test_a_message_goes_back_to_the_queue_while_the_database_is_away(
    no_pauses, ids, mailbox, monkeypatch
):
    tries = []

    def away(_):
        tries.append(1)
        raise OperationalError("away")

    with monkeypatch.context() as patch:
        patch.setattr(deliveries, "claim", away)
        with pytest.raises(Reject) as rejected:
            deliver(*ids)
    assert rejected.value.requeue
    assert len(tries) == 4, "its pauses end"
    assert mailbox.messages == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_database_that_goes_at_any_record_loses_nothing(
    no_pauses, ids, mailbox, monkeypatch, chunk, call
):
    monkeypatch.setattr(Sender, "chunk_size", classmethod(lambda cls: chunk))
    record, calls = deliveries.record, []

    def flaky(ended, begin=()):
        calls.append(1)
        if len(calls) == call:
            raise OperationalError("away")
        return record(ended, begin)

    monkeypatch.setattr(deliveries, "record", flaky)
    deliver(*ids)
    monkeypatch.undo()
    sent = Delivery.objects.filter(state=State.SENT)
    assert sent.count() == len(mailbox.messages)
    waiting = Delivery.objects.exclude(state=State.SENT)
    assert {each.state for each in waiting} <= {State.DEFERRED}, "it was not begun, so not sent"
    assert sent.count() + waiting.count() == len(ids)
    soon = timezone.now() + timedelta(minutes=1)
    assert not waiting.exclude(due_at__lt=soon).exists()
