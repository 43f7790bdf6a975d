"""Tests EMAILS_DOMAIN_LIMITS: the limits on concurrent emails and emails per minute per domain."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event

import pytest
from django.db import connection
from django.db.models import F

from emails import deliveries, pacing
from emails.models import Delivery, DomainPace
from emails.states import State
from tests.tools import claim, due, end

pytestmark = pytest.mark.django_db


@pytest.fixture
def accept_to(accept):
    """Accepts the given number of emails to a domain."""

    def accept_to(domain: str, count: int) -> None:
        for number in range(count):
            accept(recipients=[f"{number}@{domain}"])

    return accept_to


def lease(most: int = 50) -> dict[str, int]:
    """How many deliveries a relay leases, by domain."""
    ids = [leased.id for leased in deliveries.lease(most).deliveries]
    domains = list(Delivery.objects.filter(pk__in=ids).values_list("domain", flat=True))
    return {domain: domains.count(domain) for domain in set(domains)}


def test_concurrent_emails_per_domain_are_limited(accept_to, settings):
    settings.EMAILS_DOMAIN_LIMITS = {"slow.example": {"concurrent": 2}}
    accept_to("slow.example", 4)
    accept_to("fast.example", 3)
    assert lease() == {"slow.example": 2, "fast.example": 3}
    assert lease() == {}
    assert due().count() == 2
    # A sent email frees a slot. An email that is being sent does not.
    first, second = Delivery.objects.filter(domain="slow.example", published_at__isnull=False)
    claim(second)
    assert lease() == {}
    end(claim(first), State.SENT, code=250)
    assert lease() == {"slow.example": 1}


def test_full_domain_does_not_delay_others(accept_to, settings):
    settings.EMAILS_DOMAIN_LIMITS = {"slow.example": {"concurrent": 1}}
    accept_to("slow.example", 20)
    accept_to("fast.example", 3)
    assert lease(5) == {"slow.example": 1}
    assert lease(5) == {"fast.example": 3}


def test_default_limits_apply_to_each_domain_separately(accept_to, settings):
    settings.EMAILS_DOMAIN_LIMITS = {"*": {"concurrent": 1}, "own.example": {"concurrent": 3}}
    for domain in ("a.example", "b.example", "own.example"):
        accept_to(domain, 4)
    assert lease() == {"a.example": 1, "b.example": 1, "own.example": 3}


def test_rate_is_limited_over_time(accept_to, settings):
    settings.EMAILS_DOMAIN_LIMITS = {"slow.example": {"per_minute": 120}}
    accept_to("slow.example", 9)
    assert lease() == {"slow.example": 2}  # the tokens of a second
    assert lease() == {}
    assert not Delivery.objects.exclude(attempts=0).exists()

    def later(seconds: float) -> None:
        DomainPace.objects.update(updated_at=F("updated_at") - timedelta(seconds=seconds))

    later(0.5)
    assert lease() == {"slow.example": 1}
    later(60)
    assert lease() == {"slow.example": 2}, "a pause saves the tokens of a second only"


def test_rate_below_one_per_second_allows_one(accept_to, settings):
    settings.EMAILS_DOMAIN_LIMITS = {"*": {"per_minute": 6}}
    accept_to("slow.example", 3)
    assert lease() == {"slow.example": 1}
    DomainPace.objects.update(updated_at=F("updated_at") - timedelta(seconds=9.5))
    assert lease() == {}
    DomainPace.objects.update(updated_at=F("updated_at") - timedelta(seconds=1))
    assert lease() == {"slow.example": 1}


@pytest.mark.django_db(transaction=True)
def test_concurrent_relays_do_not_exceed_the_limits(accept_to, settings):
    settings.EMAILS_DOMAIN_LIMITS = {"slow.example": {"concurrent": 3, "per_minute": 600}}
    accept_to("slow.example", 20)

    def relay(_) -> int:
        try:
            return sum(lease(5).values())
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(relay, range(12))) == 3


@pytest.mark.django_db(transaction=True)
def test_relay_waits_while_another_one_counts(accept_to, settings):
    """If two relays leased at the same time, both would use the whole allowance."""
    settings.EMAILS_DOMAIN_LIMITS = {"slow.example": {"concurrent": 1}}
    accept_to("slow.example", 2)
    counting = Event()

    def count() -> None:
        try:
            with pacing.allowances():
                counting.set()
                time.sleep(0.5)
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(count)
        assert counting.wait(5)
        began = time.monotonic()
        lease()
        assert time.monotonic() - began > 0.3
