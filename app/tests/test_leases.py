"""Who may change a delivery: only the holder of its present lease, from the state it names."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from django.db import connection
from django.db.models import F
from django.utils import timezone

from emails import deliveries
from emails.models import Counter, Delivery
from emails.queries import execute, load
from emails.states import CANCELLABLE, State
from tests.tools import begin, claim, due, end

pytestmark = pytest.mark.django_db

IN_HAND = (State.SENDING, State.SENT, State.FAILED, State.DEFERRED, State.UNCERTAIN)


def test_begin_is_for_the_attempt_that_claimed(delivery):
    first = claim(delivery)
    Delivery.objects.update(state=State.QUEUED)
    second = claim(delivery)
    assert not begin(first)
    delivery.refresh_from_db()
    assert not delivery.data_sent
    assert begin(second)


def test_unclaim_is_for_the_attempt_that_claimed(delivery):
    first = claim(delivery)
    Delivery.objects.update(state=State.QUEUED)
    second = claim(delivery)
    deliveries.unclaim([first])
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts) == (State.SENDING, 2)
    begin(second)
    deliveries.unclaim([second])
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts, delivery.data_sent) == (State.QUEUED, 1, False)
    assert due().get() == delivery


def test_release_leaves_another_relays_newer_lease(delivery):
    old = deliveries.lease(1)
    deliveries.requeue([delivery.pk])
    deliveries.lease(1)
    deliveries.release(old)
    assert not due().exists()


@pytest.mark.parametrize("state", IN_HAND)
def test_requeue_is_for_what_waits_for_a_worker(delivery, state):
    later = timezone.now() + timedelta(minutes=5)
    Delivery.objects.update(state=state, due_at=later)
    deliveries.requeue([delivery.pk])
    delivery.refresh_from_db()
    assert (delivery.state, delivery.due_at) == (state, later)


@pytest.mark.parametrize("state", State)
def test_only_what_no_worker_has_is_cancelled(delivery, state):
    Delivery.objects.update(state=state)
    cancelled = deliveries.cancel([delivery.pk])
    delivery.refresh_from_db()
    assert cancelled == (state in CANCELLABLE)
    assert (delivery.state == State.CANCELLED) == (state in (*CANCELLABLE, State.CANCELLED))


def test_a_cancelled_delivery_is_neither_published_nor_claimed(delivery):
    deliveries.lease(1)  # its message is in the queue already
    deliveries.cancel([delivery.pk])
    assert deliveries.claim([delivery.pk]) == []
    assert deliveries.lease(1).deliveries == []


@pytest.mark.parametrize("state", State)
def test_only_failed_and_held_ones_are_replayed(delivery, state):
    later = timezone.now() + timedelta(minutes=5)
    Delivery.objects.update(state=state, due_at=later)
    assert deliveries.replay([delivery.pk]) == (state == State.FAILED)
    Delivery.objects.update(state=state, due_at=None)
    assert deliveries.replay([delivery.pk]) == (state in (State.FAILED, State.UNCERTAIN))


def test_an_uncertain_one_is_not_retried_past_its_deadline(delivery):
    begin(claim(delivery))
    past = timezone.now() - timedelta(seconds=1)
    Delivery.objects.update(due_at=past, expires_at=past)
    assert deliveries.lease(1).deliveries == []
    delivery.refresh_from_db()
    assert (delivery.state, delivery.due_at) == (State.UNCERTAIN, None)


def test_the_oldest_due_is_leased_first(accept):
    first, second, third = (accept().deliveries.get() for _ in range(3))
    Delivery.objects.filter(pk=third.pk).update(due_at=F("due_at") - timedelta(minutes=1))
    order = [deliveries.lease(1).deliveries[0].id for _ in range(3)]
    assert order == [third.pk, first.pk, second.pk]


def test_an_outcome_that_is_recorded_twice_counts_once(delivery):
    """A commit whose answer was lost is repeated."""
    claimed = claim(delivery)
    assert end(claimed, State.SENT, code=250)
    assert not end(claimed, State.SENT, code=250)
    assert not end(replace(claimed, number=2), State.DEFERRED, code=451)
    assert delivery.log.count() == 1
    assert Counter.objects.get(name="attempts.sent").total == 1


@pytest.mark.django_db(transaction=True)
def test_of_two_workers_at_once_one_claims(accept):
    ids = [accept().deliveries.get().pk for _ in range(20)]

    def worker(number: int) -> list[int]:
        try:
            order = ids if number % 2 else ids[::-1]
            return [claimed.id for claimed in deliveries.claim(order)]
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        claimed = [pk for found in pool.map(worker, range(4)) for pk in found]
    assert sorted(claimed) == ids


@pytest.mark.django_db(transaction=True)
def test_counters_are_merged_without_loss_while_others_add(accept):
    statements = load("emails.sql")

    def add(_) -> None:
        try:
            with execute(statements["count"], ("publish_failures", 1)):
                pass
        finally:
            connection.close()

    def merge(_) -> None:
        try:
            with execute(statements["merge_counters"]):
                pass
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        for n in range(60):
            pool.submit(merge if n % 6 == 5 else add, n)
    totals = Counter.objects.filter(name="publish_failures").values_list("total", flat=True)
    assert sum(totals) == 50
    assert len(totals) < 50
