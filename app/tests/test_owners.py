"""Tests that an owner can't see or change another owner's emails, or use another's limit."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from django.db import connection

from emails.models import Email, SendingLimits, Suppression
from emails.states import State
from tests.conftest import OTHER_KEY

pytestmark = pytest.mark.django_db

GOOD = {"subject": "Hello", "text": "Body", "to": ["bob@example.org"]}


@pytest.mark.attack(kind="HTTP: objects of other users")
def test_another_owner_cannot_read_replay_or_cancel(api, accept, other_user):
    dead, queued = accept(), accept()
    dead.deliveries.update(state=State.FAILED, due_at=None)
    calls = [
        ("get", f"emails/{dead.pk}"),
        ("post", f"emails/{dead.pk}/replay"),
        ("post", f"emails/{queued.pk}/cancel"),
    ]
    for method, path in calls:
        assert api(method, path, key=OTHER_KEY).status_code == 404
    assert dead.deliveries.get().state == State.FAILED
    assert queued.deliveries.get().state == State.QUEUED
    for method, path in calls:
        assert api(method, path).status_code in (200, 202)


@pytest.mark.attack(kind="HTTP: objects of other users")
def test_lists_contain_only_the_owners_emails_and_suppressions(api, accept, user, other_user):
    own, _ = accept(), accept(other_user)
    for owner in (user, other_user, None):
        Suppression.objects.create(owner=owner, address=f"{owner}@example.org".lower())
    listed = api("get", "emails?q=bob").json()["emails"]
    assert [email["id"] for email in listed] == [str(own.pk)]
    listed = api("get", "suppressions").json()["suppressions"]
    assert [suppression["address"] for suppression in listed] == ["alice@example.org"]


@pytest.mark.django_db(transaction=True)
def test_limit_counts_only_the_owners_emails(api, other_user, settings):
    settings.EMAILS_RECIPIENTS_PER_HOUR = 1
    for key in ({}, {"key": OTHER_KEY}):
        assert api("post", "emails", GOOD, **key).status_code == 202
        assert api("post", "emails", GOOD, **key).status_code == 429


@pytest.mark.attack(kind="HTTP: objects of other users")
@pytest.mark.django_db(transaction=True)
def test_key_of_another_owner_does_not_bypass_the_limit(api, user, other_user):
    SendingLimits.objects.create(owner=user, recipients_per_hour=1)
    used = {"Idempotency-Key": "order 17"}
    assert api("post", "emails", GOOD, OTHER_KEY, **used).status_code == 202
    assert api("post", "emails", GOOD).status_code == 202
    assert api("post", "emails", GOOD, **used).status_code == 429
    batch = {"emails": [GOOD | {"idempotency_key": "order 17"}]}
    assert api("post", "emails/batch", batch).json()["results"][0]["status"] == 429


@pytest.mark.django_db(transaction=True)
def test_limit_0_allows_nothing_for_an_owner_and_everything_in_the_settings(api, user, settings):
    settings.EMAILS_RECIPIENTS_PER_HOUR = 0
    assert api("post", "emails", GOOD).status_code == 202
    SendingLimits.objects.create(owner=user, recipients_per_hour=0)
    assert api("post", "emails", GOOD).status_code == 429
    settings.EMAILS_RECIPIENTS_PER_HOUR = 100
    assert api("post", "emails", GOOD).status_code == 429


@pytest.mark.attack(kind="HTTP: body and JSON limits")
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("way", ["emails", "emails/batch"])
def test_concurrent_requests_do_not_exceed_the_limit(api, user, way):
    SendingLimits.objects.create(owner=user, recipients_per_hour=5)
    together = Barrier(6, timeout=20)
    data = GOOD if way == "emails" else {"emails": [GOOD, GOOD]}

    def send(_):
        try:
            connection.ensure_connection()
            together.wait()
            api("post", way, data)
        finally:
            connection.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(send, range(12)))
    assert Email.objects.count() == 5
