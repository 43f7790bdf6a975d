"""EMAILS_DOMAIN_LIMITS: what the relay may publish to each domain."""

import threading
from collections import Counter
from datetime import timedelta

import pytest
from django.db import connection
from django.db.models.functions import Now

from emails import deliveries
from emails.models import Delivery, DomainPace
from emails.states import State

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def store(accept):
    def store(**counts: int) -> None:
        for domain, count in counts.items():
            for number in range(count):
                accept(recipients=[f"{number}@{domain}.example"])

    return store


def lease() -> dict[str, int]:
    """How many the relay gets now, by domain."""
    ids = [each.id for each in deliveries.lease(100).deliveries]
    return Counter(
        name.partition(".")[0]
        for name in Delivery.objects.filter(pk__in=ids).values_list("domain", flat=True)
    )


def pass_seconds(seconds: float) -> None:
    DomainPace.objects.update(updated_at=Now() - timedelta(seconds=seconds))


def test_concurrent_is_exact_and_holds_up_no_other_domain(settings, store):
    settings.EMAILS_DOMAIN_LIMITS = {"a.example": {"concurrent": 2}}
    store(a=4, b=3)
    assert lease() == {"a": 2, "b": 3}
    assert lease() == {}
    first = Delivery.objects.filter(state=State.QUEUED, domain="a.example", published_at=None)
    assert first.count() == 2
    published = Delivery.objects.filter(domain="a.example", published_at__isnull=False).first()
    Delivery.objects.filter(pk=published.pk).update(state=State.SENDING)
    assert lease() == {}, "one that is being sent counts"
    Delivery.objects.filter(pk=published.pk).update(state=State.SENT, due_at=None)
    assert lease() == {"a": 1}


def test_star_limits_each_domain_that_is_not_named(settings, store):
    settings.EMAILS_DOMAIN_LIMITS = {"*": {"concurrent": 1}, "a.example": {"concurrent": 3}}
    store(a=4, b=2, c=2)
    assert lease() == {"a": 3, "b": 1, "c": 1}
    assert lease() == {}


@pytest.mark.parametrize("named", ["a.example", "*"])
def test_per_minute_is_exact(settings, store, named):
    settings.EMAILS_DOMAIN_LIMITS = {named: {"per_minute": 120}}
    store(a=9)
    assert lease() == {"a": 2}, "those of a second"
    pass_seconds(0.25)
    assert lease() == {}
    pass_seconds(0.5)
    assert lease() == {"a": 1}
    pass_seconds(60)
    assert lease() == {"a": 2}, "a pause saves no more than a second's"


@pytest.mark.parametrize("limits", [{"concurrent": 2}, {"per_minute": 120}])
def test_two_relays_share_a_limit(settings, store, limits):
    settings.EMAILS_DOMAIN_LIMITS = {"a.example": limits}
    store(a=8)
    together, leased = threading.Barrier(2), []

    def relay() -> None:
        together.wait()
        leased.append(len(deliveries.lease(100).deliveries))
        connection.close()

    threads = [threading.Thread(target=relay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(leased) == [0, 2]
