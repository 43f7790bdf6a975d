"""POST /api/emails/batch"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from django.db import OperationalError, connection

from emails import services
from emails.models import Email, SendingLimits
from emails.states import State
from tests.conftest import OTHER_KEY

pytestmark = pytest.mark.django_db

GOOD = {"subject": "Hello", "text": "Body", "to": ["bob@example.org"]}


@pytest.fixture
def batch(api):
    def batch(*emails, **options):
        answer = api("post", "emails/batch", {"emails": emails}, **options)
        assert answer.status_code == 200, answer.content
        return answer.json()["results"]

    return batch


def statuses(results):
    return [result["status"] for result in results]


def test_stores_each_email_and_returns_results_in_order(batch, api):
    results = batch(*(GOOD | {"subject": f"Email {number}"} for number in range(20)))
    assert statuses(results) == [202] * 20
    for number, result in enumerate(results):
        assert set(result) == {"status", "id", "status_url"}
        assert api("get", f"emails/{result['id']}").json()["state"] == State.QUEUED
        assert Email.objects.get(pk=result["id"]).subject == f"Email {number}"
    assert batch() == []


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (7, "body"),
        (None, "body"),
        ([GOOD], "body"),
        (GOOD | {"subject": 7}, "subject"),
        (GOOD | {"subject": ""}, "subject"),
        (GOOD | {"to": ["bob"]}, "to"),
        (GOOD | {"to": [7]}, "to"),
        (GOOD | {"form": "no such field"}, "form"),
        (GOOD | {"attachments": [{"filename": "a", "content": "no base64!"}]}, "attachments"),
        (GOOD | {"headers": {"Bcc": "eve@example.org"}}, "headers"),
        (GOOD | {"idempotency_key": ""}, "idempotency_key"),
        ({}, "subject"),
    ],
)
def test_invalid_email_does_not_stop_the_others(batch, wrong, field):
    results = batch(GOOD, wrong, GOOD)
    assert statuses(results) == [202, 422, 202]
    assert set(results[1]) == {"status", "errors"}
    assert field in results[1]["errors"]
    assert Email.objects.count() == 2


@pytest.mark.parametrize(
    "body", [{}, [], [GOOD], {"emails": None}, {"emails": GOOD}, {"emails": [], "more": 1}]
)
def test_invalid_batch_is_refused(api, body):
    answer = api("post", "emails/batch", body)
    assert answer.status_code == 422
    assert answer.json()["errors"]


@pytest.mark.parametrize(("count", "status"), [(3, 200), (4, 422)])
def test_number_of_emails_in_a_batch_is_limited(api, settings, count, status):
    settings.EMAILS_MAX_BATCH = 3
    answer = api("post", "emails/batch", {"emails": [GOOD] * count})
    assert answer.status_code == status
    assert Email.objects.count() == (3 if status == 200 else 0)


def test_each_email_may_have_a_key(batch, api):
    first = GOOD | {"idempotency_key": "order 17"}
    results = batch(first, GOOD, first, first | {"subject": "Other"})
    assert statuses(results) == [202, 202, 202, 409]
    assert results[0]["id"] == results[2]["id"] != results[1]["id"]
    assert set(results[3]) == {"status", "detail"}
    assert batch(first)[0] == results[0], "a repeated batch must get the first ids"
    single = api("post", "emails", GOOD, **{"Idempotency-Key": "order 17"})
    assert single.json()["id"] == results[0]["id"]
    assert Email.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_hourly_limit_applies_within_a_batch(batch, user):
    SendingLimits.objects.create(owner=user, recipients_per_hour=3)
    two = GOOD | {"to": ["bob@example.org", "eve@example.org"], "idempotency_key": "two"}
    wrong = GOOD | {"to": ["bob"]}
    results = batch(two, wrong, two, two | {"idempotency_key": "other"}, GOOD, GOOD)
    assert statuses(results) == [202, 422, 202, 429, 202, 429]
    assert set(results[3]) == {"status", "detail"}
    assert statuses(batch(two, GOOD)) == [202, 429]


@pytest.mark.django_db(transaction=True)
def test_failed_batch_stores_nothing(api, monkeypatch):
    stored = []

    def store(draft):
        if len(stored) == 2:
            raise OperationalError("server closed the connection")
        stored.append(draft)
        return store_really(draft)

    store_really = services.store
    monkeypatch.setattr(services, "store", store)
    answer = api("post", "emails/batch", {"emails": [GOOD] * 3})
    assert answer.status_code == 503
    assert len(stored) == 2
    assert not Email.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_batch_notifies_the_relay_once_and_commits_once(batch, monkeypatch):
    monkeypatch.setattr(services, "NOTIFY_SECONDS", 0)
    notified = []
    monkeypatch.setattr(services, "notify_relay", lambda: notified.append(Email.objects.count()))
    batch(*[GOOD] * 5)
    assert notified == [5]


@pytest.mark.django_db(transaction=True)
def test_batches_with_the_same_keys_in_another_order_do_not_deadlock(batch):
    emails = [GOOD | {"idempotency_key": f"order {number}"} for number in range(40)]
    together = Barrier(2, timeout=20)

    def send(ordered):
        try:
            connection.ensure_connection()
            together.wait()
            return {result["id"] for result in batch(*ordered)}
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(send, (emails, emails[::-1]))
    assert one == other
    assert Email.objects.count() == 40


def test_emails_of_a_batch_belong_to_the_keys_owner(batch, api, other_user):
    (result,) = batch(GOOD | {"idempotency_key": "order 17"}, key=OTHER_KEY)
    assert Email.objects.get().owner == other_user
    assert api("get", f"emails/{result['id']}").status_code == 404
    (own,) = batch(GOOD | {"idempotency_key": "order 17"})
    assert own["id"] != result["id"]
