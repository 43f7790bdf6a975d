import pytest

from emails.models import ApiKey, Email, State
from tests.conftest import KEY

pytestmark = pytest.mark.django_db

GOOD = {"subject": "Hello", "text": "Body", "to": ["bob@example.org", "eve@example.org"]}


@pytest.fixture
def post(client, api_key):
    def post(data, key=KEY):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return client.post("/api/emails", data, content_type="application/json", headers=headers)

    return post


def test_accepts_an_email_and_tells_its_state(post, client):
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
def test_refuses_bad_input_and_names_the_field(post, field, value):
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


@pytest.mark.parametrize("key", [None, "wrong", ""])
def test_refuses_a_missing_or_unknown_key(post, key):
    assert post(GOOD, key).status_code == 401
    assert not Email.objects.exists()


def test_refuses_a_revoked_key_and_an_inactive_owner(post, api_key, user):
    ApiKey.objects.update(revoked=True)
    assert post(GOOD).status_code == 401
    ApiKey.objects.update(revoked=False)
    assert post(GOOD).status_code == 202
    user.is_active = False
    user.save()
    assert post(GOOD).status_code == 401


def test_keys_are_stored_as_hashes_only(api_key):
    stored = " ".join(str(value) for value in ApiKey.objects.values().get().values())
    assert KEY not in stored


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
def test_the_state_of_an_email_is_its_least_finished_delivery(accept, states, whole):
    email = accept(recipients=["bob@example.org", "eve@example.org"])
    for delivery, state in zip(email.deliveries.all(), states, strict=True):
        email.deliveries.filter(pk=delivery.pk).update(state=state)
    assert email.state == whole


def test_documents_itself_without_a_cdn(client):
    paths = client.get("/api/openapi.json").json()["paths"]
    assert set(paths) == {
        "/api/emails",
        "/api/emails/{email_id}",
        "/api/emails/{email_id}/replay",
    }
    page = client.get("/api/docs").content.decode()
    assert "/static/ninja/swagger-ui-bundle.js" in page
    assert "https://" not in page
