"""Tests that only a lease's holder can change the delivery, with several relays and workers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import Mock

import pytest
from django.db import connection
from django.db.models import F, Sum
from django.utils import timezone

from emails import deliveries
from emails import publisher as publisher_module
from emails import relay as relay_module
from emails.delivery_records import Ended
from emails.models import Counter, Delivery
from emails.outcomes import Step
from emails.publisher import Publisher
from emails.queries import execute
from emails.relay import Relay
from emails.states import State
from emails.tasks import deliver
from tests.harness import eventually
from tests.tools import begin, claim, due, end

pytestmark = pytest.mark.django_db


def row(delivery: Delivery) -> dict:
    return Delivery.objects.filter(pk=delivery.pk).values().get()


def lease_again(delivery: Delivery) -> None:
    """Queues a delivery again, as the relay does after the worker of an attempt has died."""
    Delivery.objects.filter(pk=delivery.pk).update(state=State.QUEUED)


def all_at_once(*acts) -> list:
    """Runs each function in a thread with a separate connection; returns the results."""
    together = threading.Barrier(len(acts))

    def run(act):
        try:
            connection.ensure_connection()
            together.wait(timeout=10)
            return act()
        finally:
            connection.close()

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


# ---- States ----


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("claim", {State.QUEUED}),
        ("requeue", {State.QUEUED}),
        ("release", {State.QUEUED}),
        ("unclaim", {State.SENDING}),
        ("begin", {State.SENDING}),
        ("cancel", {State.SCHEDULED, State.QUEUED, State.DEFERRED}),
        ("replay", {State.FAILED}),  # and a held one, below
    ],
)
def test_change_requires_a_previous_state(delivery, name, states):
    leased = deliveries.lease(1)
    claimed = claim(delivery)
    act = {
        "claim": lambda: deliveries.claim([delivery.pk]),
        "requeue": lambda: deliveries.requeue([delivery.pk]),
        "release": lambda: deliveries.release(leased),
        "unclaim": lambda: deliveries.unclaim([claimed]),
        "begin": lambda: begin(claimed),
        "cancel": lambda: deliveries.cancel([delivery.pk]),
        "replay": lambda: deliveries.replay([delivery.pk]),
    }[name]
    as_claimed = row(delivery)
    changed = set()
    for state in State:
        Delivery.objects.update(**as_claimed | {"state": state})
        before = row(delivery)
        act()
        if row(delivery) != before:
            changed.add(state)
    assert changed == states


def test_only_a_held_uncertain_delivery_is_replayed(delivery):
    Delivery.objects.update(state=State.UNCERTAIN, due_at=timezone.now() + timedelta(minutes=1))
    assert deliveries.replay([delivery.pk]) == 0
    Delivery.objects.update(due_at=None)
    assert deliveries.replay([delivery.pk]) == 1


# ---- Attempts ----


def test_earlier_attempt_cannot_unclaim_the_current_one(delivery):
    earlier = claim(delivery)
    lease_again(delivery)
    present = claim(delivery)
    before = row(delivery)
    deliveries.unclaim([earlier])
    assert row(delivery) == before
    deliveries.unclaim([present])
    after = row(delivery)
    assert (after["state"], after["attempts"], after["published_at"]) == (State.QUEUED, 1, None)


def test_attempts_of_any_durations_end_together(accept):
    """The buckets of these durations have integers and floats as upper bounds."""
    claimed = [claim(accept().deliveries.get()) for _ in range(4)]
    ended = [
        Ended(each.id, each.number, Step(State.SENT, None), 250, "OK", seconds)
        for each, seconds in zip(claimed, (0.2, 0.9, 300, 3), strict=True)
    ]
    done, _ = deliveries.record(ended)
    assert done == {each.id for each in claimed}


def test_earlier_attempt_cannot_begin_the_current_one(delivery):
    earlier = claim(delivery)
    lease_again(delivery)
    present = claim(delivery)
    assert not begin(earlier)
    assert not row(delivery)["data_sent"]
    assert begin(present)


@pytest.mark.django_db(transaction=True)
def test_only_the_worker_with_the_lease_begins(accept):
    for _ in range(10):
        delivery = accept().deliveries.get()
        earlier = claim(delivery)
        lease_again(delivery)
        present = claim(delivery)
        begun = all_at_once(lambda c=earlier: begin(c), lambda c=present: begin(c))
        assert begun == [False, True]


@pytest.mark.django_db(transaction=True)
def test_only_one_worker_claims_a_delivery(accept):
    ids = [accept().deliveries.get().pk for _ in range(30)]
    claims = all_at_once(*[lambda: deliveries.claim(ids)] * 4)
    assert sorted(each.id for claimed in claims for each in claimed) == ids
    assert set(Delivery.objects.values_list("attempts", flat=True)) == {1}


# ---- The relay's leases ----


def test_release_keeps_the_lease_of_another_relay(delivery):
    earlier = deliveries.lease(1)
    deliveries.requeue([delivery.pk])
    present = deliveries.lease(1)
    before = row(delivery)
    deliveries.release(earlier)
    assert row(delivery) == before
    deliveries.release(present)
    assert due().get() == delivery


def test_the_oldest_due_goes_first(accept):
    newest, oldest, middle = (accept().deliveries.get() for _ in range(3))
    for delivery, minutes in ((newest, 1), (oldest, 3), (middle, 2)):
        due_at = timezone.now() - timedelta(minutes=minutes)
        Delivery.objects.filter(pk=delivery.pk).update(due_at=due_at)
    leased = [deliveries.lease(1).deliveries[0].id for _ in range(3)]
    assert leased == [oldest.pk, middle.pk, newest.pk]


def test_publishing_ends_before_its_lease(accept, monkeypatch):
    """If publishing took longer, other relays would publish the batch again."""
    first, *others = (accept().deliveries.get() for _ in range(3))
    published = []

    def publish(args, **_):
        published.extend(args)
        time.sleep(0.6)

    monkeypatch.setattr(publisher_module, "PUBLISHING_SECONDS", 0.5)
    monkeypatch.setattr(Publisher, "_connect", lambda self: None)
    monkeypatch.setattr(deliver, "apply_async", publish)
    assert Publisher().publish_due() == 3
    assert published == [first.pk]
    assert list(due()) == others


def test_uncertain_delivery_is_not_retried_after_its_deadline(delivery):
    begin(claim(delivery))
    past = timezone.now() - timedelta(seconds=1)
    Delivery.objects.update(due_at=past, expires_at=past)
    assert deliveries.lease(1).deliveries == []
    after = row(delivery)
    assert (after["state"], after["due_at"]) == (State.UNCERTAIN, None)


# ---- Repairs by the relay ----


@pytest.fixture
def running(monkeypatch, settings):
    """Starts a relay with `waiting` messages in the queue; returns the published ids."""
    settings.EMAILS_RELAY_POLL_SECONDS = 0.05
    settings.EMAILS_RELAY_THREADS = 1
    published, threads, relays = [], [], []
    monkeypatch.setattr(deliver, "apply_async", lambda args, **_: published.extend(args))

    def run(waiting: int = 0) -> list[int]:
        broker = Mock()
        broker.default_channel.queue_declare.return_value.message_count = waiting
        connect = lambda self: setattr(self, "_connection", broker)  # noqa: E731
        monkeypatch.setattr(Publisher, "_connect", connect)
        relays.append(Relay())
        threads.append(threading.Thread(target=relays[-1].run))
        threads[-1].start()
        return published

    yield run
    for relay, thread in zip(relays, threads, strict=True):
        relay.stop()
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.django_db(transaction=True)
def test_the_relay_resets_due_times_of_a_wrong_clock(delivery, running):
    Delivery.objects.update(due_at=timezone.now() + timedelta(days=1))
    published = running()
    eventually(lambda: published == [delivery.pk], seconds=10)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("waiting", [0, 1])
def test_relay_republishes_deliveries_that_an_empty_queue_lost(delivery, running, waiting):
    deliveries.lease(1)
    earlier = timedelta(seconds=31)
    Delivery.objects.update(due_at=F("due_at") - earlier, published_at=F("published_at") - earlier)
    published = running(waiting)
    if waiting:
        time.sleep(1)
        assert published == []
    else:
        eventually(lambda: published == [delivery.pk], seconds=10)


@pytest.mark.django_db(transaction=True)
def test_merging_counters_loses_nothing(db):
    def add():
        for _ in range(100):
            with execute(relay_module.SQL["count"], ("accepted", 1)):
                pass

    def merge():
        for _ in range(50):
            Relay._repair(Mock())

    all_at_once(add, add, merge, merge)
    assert Counter.objects.aggregate(Sum("total"))["total__sum"] == 200
    Relay._repair(Mock())
    assert Counter.objects.get().total == 200


# ---- The relay's connection to the broker ----


@pytest.mark.parametrize("idle", [False, True])
def test_idle_broker_connection_is_replaced(delivery, monkeypatch, idle):
    old, new = Mock(), Mock()
    monkeypatch.setattr(deliver.app, "connection_for_write", lambda **_: new)
    monkeypatch.setattr(deliver, "apply_async", lambda *_, **__: None)
    publisher = Publisher()
    publisher._connection = old
    silent = publisher_module.IDLE_SECONDS + (1 if idle else -5)
    publisher._used = time.monotonic() - silent
    publisher.publish_due()
    assert publisher._connection is (new if idle else old)
    assert old.collect.called is idle
    assert new.connect.called is idle


# ---- A commit whose answer was lost ----


def test_outcome_that_is_recorded_twice_counts_once(delivery):
    claimed = claim(delivery)
    assert end(claimed, State.SENT, code=250)
    assert not end(claimed, State.SENT, code=250)
    assert delivery.log.count() == 1
    assert Counter.objects.get(name="attempts.sent").total == 1
