from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier
from unittest.mock import patch

import pytest
from django.db import DataError, InterfaceError, OperationalError, connection
from django.utils import timezone

from emails import api_keys, deliveries, services, validation
from emails.models import ApiKey, Delivery, Email, SendingLimits
from emails.states import State
from emails.validation import File
from tests.conftest import KEY
from tests.tools import claim

pytestmark = pytest.mark.django_db

GOOD = {"subject": "Hello", "text": "Body", "to": ["bob@example.org", "eve@example.org"]}


@pytest.fixture
def post(client, api_key):
    def post(data, key=KEY, idempotency_key=None, request_id=None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        if request_id is not None:
            headers["X-Request-ID"] = request_id
        return client.post("/api/emails", data, content_type="application/json", headers=headers)

    return post


def test_accepts_an_email_and_reports_its_state(post, client):
    response = post(GOOD | {"html": "<p>Body</p>", "from": "News <news@example.com>"})
    assert response.status_code == 202
    accepted = response.json()
    assert accepted["status_url"] == f"http://testserver/api/emails/{accepted['id']}"

    status = client.get(accepted["status_url"], headers={"Authorization": f"Bearer {KEY}"})
    assert status.status_code == 200
    body = status.json()
    assert body["id"] == accepted["id"]
    assert body["state"] == "queued"
    assert [recipient["recipient"] for recipient in body["recipients"]] == GOOD["to"]
    assert body["recipients"][0] | {"recipient": None} == {
        "recipient": None,
        "kind": "to",
        "state": "queued",
        "attempts": 0,
        "uncertain_attempts": 0,
        "next_attempt_at": None,
        "sent_at": None,
        "smtp_code": None,
        "error": "",
        "log": [],
    }
    stored = Email.objects.get()
    assert (stored.sender, stored.html) == ("News <news@example.com>", "<p>Body</p>")


@pytest.mark.attack(kind="email: wrong fields")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subject", ""),
        ("subject", "  "),
        ("subject", "Hello\nBcc: victim@example.org"),
        ("subject", "Hello\rBcc: victim@example.org"),
        ("subject", "Hello\u2028Bcc: victim@example.org"),
        ("subject", "x" * 256),
        ("subject", "half a pair \ud800"),
        ("subject", 7),
        ("text", ""),
        ("text", "nul \0"),
        ("html", "nul \0"),
        ("from", "stranger@example.org"),
        ("from", "News <stranger@example.org>"),
        ("from", "news@example.com\nBcc: victim@example.org"),
        ("from", "no address"),
        ("to", []),
        ("to", "bob@example.org"),
        ("to", ["bob"]),
        ("to", ["bob@example.org\nvictim@example.org"]),
        ("to", ["Bob <bob@example.org>"]),
        ("to", ["half@\ud800.example.org"]),
        ("to", [f"{name}@example.org" for name in "abcd"]),
        ("form", "a field that doesn't exist"),
    ],
)
def test_refuses_invalid_input_and_names_the_field(post, field, value):
    response = post(GOOD | {field: value})
    assert response.status_code == 422
    assert list(response.json()["errors"]) == [field]
    assert not Email.objects.exists()


def test_names_a_missing_field(post):
    response = post({"subject": "Hello", "to": GOOD["to"]})
    assert response.status_code == 422
    assert list(response.json()["errors"]) == ["text"]


@pytest.mark.parametrize("sender", ["mailroom@example.org", "NEWS@example.com", "any@Example.Net"])
def test_allows_senders_by_address_and_by_domain(post, sender):
    assert post(GOOD | {"from": sender}).status_code == 202


def test_a_recipient_named_twice_gets_one_email(post):
    assert post(GOOD | {"to": ["bob@example.org"] * 4}).status_code == 202
    assert Email.objects.get().deliveries.count() == 1


@pytest.mark.attack(kind="HTTP: keys and tokens")
@pytest.mark.parametrize("key", [None, "wrong", ""])
def test_refuses_a_missing_or_unknown_key(post, key):
    assert post(GOOD, key).status_code == 401
    assert not Email.objects.exists()


@pytest.mark.attack(kind="HTTP: keys and tokens")
def test_refuses_a_revoked_key_and_an_inactive_owner(post, api_key, user):
    ApiKey.objects.update(revoked=True)
    assert post(GOOD).status_code == 401
    ApiKey.objects.update(revoked=False)
    assert post(GOOD).status_code == 202
    user.is_active = False
    user.save()
    assert post(GOOD).status_code == 401


@pytest.mark.parametrize("limit", [None, 6])
def test_key_owner_and_limits_are_loaded_in_one_query(
    api_key, user, limit, django_assert_num_queries
):
    ApiKey.objects.create(owner=user, name="another", digest=api_keys.hash_key("another"))
    if limit:
        SendingLimits.objects.create(owner=user, senders="@shop.example", recipients_per_hour=limit)
    with django_assert_num_queries(1):
        key = api_keys.authenticate(KEY)
        found = (key.owner, getattr(key.owner, "sending_limits", None))
    assert key == api_key and key.created_at == api_key.created_at
    assert found == (user, SendingLimits.objects.first())
    assert not limit or (found[1].senders, found[1].recipients_per_hour) == ("@shop.example", 6)


def test_keys_are_stored_as_hashes_only(api_key):
    stored = " ".join(str(value) for value in ApiKey.objects.values().get().values())
    assert KEY not in stored


@pytest.mark.attack(kind="HTTP: objects of other users")
def test_emails_of_others_are_not_found(client, api_key, accept, django_user_model):
    email = accept()
    ApiKey.objects.update(owner=django_user_model.objects.create_user("mallory"))
    response = client.get(f"/api/emails/{email.pk}", headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        ((State.SENT, State.SENT), State.SENT),
        ((State.SENT, State.FAILED), State.FAILED),
        ((State.UNCERTAIN, State.FAILED), State.UNCERTAIN),
        ((State.FAILED, State.DEFERRED), State.DEFERRED),
        ((State.DEFERRED, State.QUEUED), State.QUEUED),
        ((State.QUEUED, State.SENDING), State.SENDING),
    ],
)
def test_email_has_the_state_of_its_least_finished_delivery(accept, states, whole):
    email = accept(recipients=["bob@example.org", "eve@example.org"])
    for delivery, state in zip(email.deliveries.all(), states, strict=True):
        email.deliveries.filter(pk=delivery.pk).update(state=state)
    assert email.state == whole


def test_api_documentation_needs_no_cdn(client):
    paths = client.get("/api/openapi.json").json()["paths"]
    assert set(paths) == {
        "/api/emails",
        "/api/emails/batch",
        "/api/emails/{email_id}",
        "/api/emails/{email_id}/cancel",
        "/api/emails/{email_id}/replay",
        "/api/suppressions",
        "/api/suppressions/{suppression_id}",
    }
    page = client.get("/api/docs").content.decode()
    assert "/static/ninja/swagger-ui-bundle.js" in page
    assert "https://" not in page


@pytest.mark.attack
@pytest.mark.parametrize("path", ["/api/docs", "/api/openapi.json"])
def test_api_documentation_needs_a_login_unless_it_is_public(client, user, settings, path):
    settings.EMAILS_API_DOCS_PUBLIC = False
    response = client.get(path)
    assert (response.status_code, response["Location"]) == (302, f"/login/?next={path}")
    client.force_login(user)
    assert client.get(path).status_code == 200


# Idempotency


def test_repeated_key_returns_the_first_id(post):
    first = post(GOOD, idempotency_key="order 17")
    again = post(GOOD, idempotency_key="order 17")
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert Email.objects.get().deliveries.count() == 2
    assert post(GOOD, idempotency_key="order 18").json() != first.json()
    assert post(GOOD).json() != first.json()


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "Other"},
        {"text": "Other"},
        {"html": "<p>Other</p>"},
        {"to": GOOD["to"][:1]},
        {"cc": ["carl@example.org"]},
        {"from": "news@example.com"},
        {"reply_to": ["news@example.com"]},
        {"attachments": [{"filename": "a.txt", "content": "YQ=="}]},
        {"deadline": "2099-01-01T00:00:00Z"},
        {"send_at": "2099-01-01T00:00:00Z"},
        {"headers": {"X-Campaign": "spring"}},
        {"show_recipients": True},
        {"skip_suppressed": True},
    ],
)
def test_key_with_other_content_is_a_conflict(post, settings, change):
    settings.EMAILS_RETENTION_DAYS = 100_000
    assert post(GOOD, idempotency_key="order 17").status_code == 202
    answer = post(GOOD | change, idempotency_key="order 17")
    assert answer.status_code == 409
    assert "idempotency key" in answer.json()["detail"]
    assert Email.objects.count() == 1


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("attachments", [{"filename": "a", "content": "YQ=="}], [{"filename": "a", "content": ""}]),
        ("send_at", "2098-01-01T00:00:00Z", "2099-01-01T00:00:00Z"),
        ("headers", {"X-Campaign": "spring"}, {"X-Campaign": "autumn"}),
    ],
)
def test_key_with_another_value_of_a_field_is_a_conflict(post, settings, field, one, other):
    settings.EMAILS_RETENTION_DAYS = 100_000
    assert post(GOOD | {field: one}, idempotency_key="order 17").status_code == 202
    assert post(GOOD | {field: one}, idempotency_key="order 17").status_code == 202
    assert post(GOOD | {field: other}, idempotency_key="order 17").status_code == 409


def test_owners_can_use_the_same_key(post, django_user_model):
    first = post(GOOD, idempotency_key="order 17").json()["id"]
    ApiKey.objects.update(owner=django_user_model.objects.create_user("mallory"))
    assert post(GOOD, idempotency_key="order 17").json()["id"] != first


@pytest.mark.parametrize("key", ["", "x" * 256, "grün"])
def test_refuses_an_invalid_key(post, key):
    answer = post(GOOD, idempotency_key=key)
    assert answer.status_code == 422
    assert list(answer.json()["errors"]) == ["idempotency_key"]


@pytest.mark.django_db(transaction=True)
def test_concurrent_requests_with_one_key_store_one_email(post):
    together = Barrier(8, timeout=20)

    def request(_):
        try:
            connection.ensure_connection()
            together.wait()
            return post(GOOD, idempotency_key="order 17").json()["id"]
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(request, range(24)))
    assert len(ids) == 1
    assert Email.objects.count() == 1


# Recipients, attachments, deadline


def test_cc_bcc_and_reply_to_are_stored_once_each(post):
    email = GOOD | {
        "cc": ["carl@example.org", "bob@example.org"],
        "bcc": [],
        "reply_to": ["Help <help@example.org>"],
    }
    assert post(email).status_code == 202
    stored = Email.objects.get()
    kinds = dict(stored.deliveries.values_list("recipient", "kind"))
    assert kinds == {"bob@example.org": "to", "eve@example.org": "to", "carl@example.org": "cc"}
    assert stored.reply_to == ["Help <help@example.org>"]
    assert stored.show_recipients


ATTACHMENT = {"filename": "a.txt", "content_type": "text/plain", "content": "YQ=="}


@pytest.mark.attack(kind="email: wrong fields")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("to", ["a@b.org", "c@d.org", "e@f.org"]),  # one too many with the bcc
        ("cc", ["carl"]),
        ("bcc", ["carl\n@example.org"]),
        ("reply_to", ["carl"]),
        ("reply_to", ["carl@example.org\nBcc: victim@example.org"]),
        ("attachments", [ATTACHMENT | {"content": "no base64!"}]),
        ("attachments", [ATTACHMENT | {"content_type": "text"}]),
        ("attachments", [ATTACHMENT | {"content_type": "message/rfc822"}]),
        ("attachments", [ATTACHMENT | {"content_type": "text/plain\nX: y"}]),
        ("attachments", [ATTACHMENT | {"filename": "a\r\nX: y"}]),
        ("attachments", [ATTACHMENT | {"size": 1}]),
        ("attachments", [ATTACHMENT | {"content": "YWFhYQ==" * 300}]),
        ("deadline", "2020-01-01T00:00:00Z"),
        ("deadline", "2099-01-01T00:00:00Z"),
        ("deadline", "2099-01-01T00:00:00"),
        ("deadline", "tomorrow"),
    ],
)
def test_refuses_invalid_optional_fields_and_names_the_field(post, settings, field, value):
    settings.EMAILS_MAX_EMAIL_BYTES = 1000
    response = post(GOOD | {"to": ["bob@example.org"], "bcc": ["dan@example.org"], field: value})
    assert response.status_code == 422
    assert list(response.json()["errors"]) == [field]
    assert not Email.objects.exists()


def test_too_large_request_is_refused_before_it_is_read(post, settings):
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
    response = post(GOOD | {"text": "x" * 1000})
    assert response.status_code == 413


# Owners


def test_owner_can_have_its_own_senders(post, user):
    SendingLimits.objects.create(owner=user, senders="shop@example.net @shop.example")
    assert post(GOOD | {"from": "Shop <shop@example.net>"}).status_code == 202
    assert post(GOOD | {"from": "any@shop.example"}).status_code == 202
    assert post(GOOD | {"from": "news@example.com"}).status_code == 422
    assert post(GOOD).status_code == 422, "the default sender is not one of them"


@pytest.mark.django_db(transaction=True)
def test_owner_can_have_an_hourly_limit(post, user, settings):
    settings.EMAILS_RECIPIENTS_PER_HOUR = 4
    assert post(GOOD, idempotency_key="first").status_code == 202
    assert post(GOOD).status_code == 202
    refused = post(GOOD)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert post(GOOD, idempotency_key="first").status_code == 202, "a repeated email does not count"
    SendingLimits.objects.create(owner=user, recipients_per_hour=6)
    assert post(GOOD).status_code == 202
    assert post(GOOD).status_code == 429
    Email.objects.update(created_at=timezone.now() - timedelta(minutes=61))
    assert post(GOOD).status_code == 202


def test_deadline_applies_to_every_delivery(accept):
    deadline = timezone.now() + timedelta(hours=3)
    email = accept(recipients=["bob@example.org", "eve@example.org"], deadline=deadline)
    assert [delivery.expires_at for delivery in email.deliveries.all()] == [deadline, deadline]


@pytest.mark.django_db(transaction=True)
def test_email_is_not_stored_without_its_attachments(accept):
    # Longer than the column, so that the database refuses it, without the validation.
    with patch.object(validation, "check_attachments"), pytest.raises(DataError):
        accept(attachments=[File("a.txt", "x" * 200, b"a")])
    assert not Email.objects.exists()


def test_send_at_delays_an_email_and_its_deadline(api, settings):
    settings.EMAILS_DEADLINE_SECONDS = 600
    send_at = timezone.now() + timedelta(hours=3)
    accepted = api("post", "emails", GOOD | {"send_at": send_at.isoformat()}).json()
    shown = api("get", f"emails/{accepted['id']}").json()
    assert shown["state"] == "scheduled"
    next_attempt = datetime.fromisoformat(shown["recipients"][0]["next_attempt_at"])
    assert abs(next_attempt - send_at) < timedelta(milliseconds=1)
    delivery = Email.objects.get().deliveries.first()
    assert (delivery.due_at, delivery.expires_at) == (send_at, send_at + timedelta(minutes=10))
    assert deliveries.lease(9).deliveries == []
    Delivery.objects.update(due_at=timezone.now())
    assert len(deliveries.lease(9).deliveries) == 2


@pytest.mark.parametrize(("minutes", "status"), [(59, 422), (60, 422), (61, 202)])
def test_deadline_must_be_later_than_send_at(post, minutes, status):
    now = timezone.now()
    send_at, deadline = now + timedelta(hours=1), now + timedelta(minutes=minutes)
    answer = post(GOOD | {"send_at": send_at.isoformat(), "deadline": deadline.isoformat()})
    assert answer.status_code == status
    assert status == 202 or list(answer.json()["errors"]) == ["deadline"]


@pytest.mark.parametrize("way", ["send_at", "deadline"])
def test_time_without_a_zone_is_refused(post, way):
    time = (timezone.now() + timedelta(hours=1)).replace(tzinfo=None).isoformat()
    assert list(post(GOOD | {way: time}).json()["errors"]) == [way]


# Listing, replay, cancel


@pytest.fixture
def get(client, api_key):
    return lambda path: client.get(path, headers={"Authorization": f"Bearer {KEY}"}).json()


def test_lists_by_state_text_and_page(get, accept):
    # Ids are sorted by millisecond. Within a millisecond, their order is random.
    emails = sorted((accept(subject=f"Email {n}.") for n in range(5)), key=lambda email: email.pk)
    emails[1].deliveries.update(state=State.FAILED, due_at=None)
    emails[2].deliveries.update(recipient="carl@example.org")

    def ids(query: str) -> list[str]:
        return [email["id"] for email in get(f"/api/emails?{query}")["emails"]]

    assert ids("") == [str(email.pk) for email in reversed(emails)]
    assert ids("state=failed") == [str(emails[1].pk)]
    assert ids("q=CARL@") == [str(emails[2].pk)]
    assert ids(f"q={emails[3].subject.lower()}") == [str(emails[3].pk)]
    assert ids(f"q={emails[4].pk}") == [str(emails[4].pk)]
    assert ids("q=%00") == ids("")
    page = get("/api/emails?limit=2")
    assert page["next"] == str(emails[3].pk)
    assert ids(f"limit=2&before={page['next']}") == [str(emails[2].pk), str(emails[1].pk)]
    assert get("/api/emails?limit=5")["next"] is None


def test_replays_only_failed_and_held_deliveries(client, get, post, accept):
    email = accept(recipients=["a@example.org", "b@example.org", "c@example.org"])
    failed, held, sent = email.deliveries.all()
    email.deliveries.filter(pk=failed.pk).update(state=State.FAILED, due_at=None)
    email.deliveries.filter(pk=held.pk).update(state=State.UNCERTAIN, due_at=None)
    email.deliveries.filter(pk=sent.pk).update(state=State.SENT, due_at=None)
    Email.objects.update(created_at=timezone.now() - timedelta(days=3))
    headers = {"Authorization": f"Bearer {KEY}"}
    response = client.post(f"/api/emails/{email.pk}/replay", headers=headers)
    assert (response.status_code, response.json()) == (202, {"replayed": 2})
    assert [delivery.state for delivery in email.deliveries.all()] == ["queued", "queued", "sent"]
    assert {leased.id for leased in deliveries.lease(9).deliveries} == {failed.pk, held.pk}, (
        "the deadline is not renewed"
    )
    response = client.post(f"/api/emails/{email.pk}/replay", headers=headers)
    assert response.json() == {"replayed": 0}


def test_cancels_deliveries_that_no_worker_has_started_to_send(api, accept):
    email = accept(recipients=[f"{name}@example.org" for name in "abc"])
    sending, deferred, queued = email.deliveries.all()
    claim(sending)
    email.deliveries.filter(pk=deferred.pk).update(state=State.DEFERRED)
    answer = api("post", f"emails/{email.pk}/cancel")
    assert (answer.status_code, answer.json()) == (202, {"cancelled": 2})
    assert [each.state for each in email.deliveries.all()] == ["sending", "cancelled", "cancelled"]
    assert api("post", f"emails/{email.pk}/cancel").json() == {"cancelled": 0}
    email.deliveries.filter(pk=sending.pk).update(state=State.CANCELLED, due_at=None)
    assert api("get", f"emails/{email.pk}").json()["state"] == "cancelled"
    assert api("post", f"emails/{email.pk}/replay").json() == {"replayed": 0}


def test_cancelled_scheduled_email_is_never_sent(api, accept):
    email = accept(send_at=timezone.now() + timedelta(minutes=1))
    assert api("post", f"emails/{email.pk}/cancel").json() == {"cancelled": 1}
    Email.objects.update(created_at=timezone.now() - timedelta(hours=1))
    assert deliveries.lease(9).deliveries == []
    assert deliveries.claim([email.deliveries.get().pk]) == []


@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
def test_unavailable_database_is_a_503(post, monkeypatch, error):
    def fail(*_):
        raise error("server closed the connection")

    monkeypatch.setattr(api_keys, "authenticate", fail)
    answer = post(GOOD)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    assert "may not have been accepted" in answer.json()["detail"]


@pytest.mark.django_db(transaction=True)
def test_failed_notification_does_not_fail_the_request(post, monkeypatch):
    monkeypatch.setattr(services, "_notified_at", float("-inf"))
    monkeypatch.setitem(services.SQL, "notify", "SELECT no_such_function()")
    assert post(GOOD).status_code == 202
    assert Email.objects.count() == 1


def test_responses_are_not_cached(api, accept):
    email = accept()
    for answer in (
        api("get", "emails"),
        api("post", "emails", GOOD),
        api("post", "emails", {}),
        api("get", f"emails/{email.pk}"),
        api("get", "emails", key="wrong"),
        added := api("post", "suppressions", {"address": "x@example.org"}),
        api("delete", f"suppressions/{added.json()['id']}"),
        api("delete", f"suppressions/{added.json()['id']}"),
    ):
        assert answer.headers["Cache-Control"] == "no-store", answer


def test_accepting_an_email_needs_no_broker(post, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("connected to the broker")

    monkeypatch.setattr("kombu.connection.Connection.connect", refuse)
    monkeypatch.setattr("kombu.connection.Connection._ensure_connection", refuse)
    monkeypatch.setattr("celery.app.amqp.Producer.publish", refuse)
    assert post(GOOD).status_code == 202


def test_email_stores_the_request_id(client, post, caplog):
    answer = post(GOOD, request_id="order-17.a")
    assert answer.headers["X-Request-ID"] == "order-17.a"
    assert Email.objects.get().request_id == "order-17.a"
    assert "bob@example.org" not in caplog.text
    for unsound in ("two words", "x" * 65, "a\u00fc"):
        assert len(post(GOOD, request_id=unsound).headers["X-Request-ID"]) == 32
