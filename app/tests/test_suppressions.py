"""Tests the suppression list of an owner."""

import pytest
from django.core.mail import send_mail

from emails.models import Delivery, Email, Suppression
from emails.states import State
from emails.tasks import deliver
from tests.conftest import OTHER_KEY

pytestmark = pytest.mark.django_db

GOOD = {"subject": "Hello", "text": "Body", "to": ["bob@example.org", "eve@example.org"]}


def test_adds_lists_and_removes_an_address(api):
    added = api("post", "suppressions", {"address": "Bob+Lists@Example.org"})
    assert added.status_code == 201
    shown = added.json()
    assert shown | {"created_at": "", "id": 0} == {
        "id": 0,
        "address": "bob+lists@example.org",
        "reason": "manual",
        "detail": "",
        "created_at": "",
    }
    again = api("post", "suppressions", {"address": "bob+lists@example.ORG"})
    assert (again.status_code, again.json()) == (200, shown)
    assert api("get", "suppressions").json() == {"suppressions": [shown], "next": None}
    assert api("delete", f"suppressions/{shown['id']}").status_code == 204
    assert api("delete", f"suppressions/{shown['id']}").status_code == 404
    for unknown in ("9" * 30, "-1"):
        assert api("delete", f"suppressions/{unknown}").status_code in (404, 422)
    assert api("get", "suppressions").json()["suppressions"] == []


@pytest.mark.parametrize("address", ["bob", "Bob <bob@example.org>", "bob@example.org\n", "", 7])
def test_refuses_an_invalid_address(api, address):
    answer = api("post", "suppressions", {"address": address})
    assert answer.status_code == 422
    assert list(answer.json()["errors"]) == ["address"]


def test_lists_by_text_and_page(api, user):
    for number in range(5):
        Suppression.objects.create(owner=user, address=f"user{number}@example.org")

    def listed(query: str) -> list[str]:
        found = api("get", f"suppressions?{query}").json()["suppressions"]
        return [suppression["address"].partition("@")[0] for suppression in found]

    assert listed("") == ["user4", "user3", "user2", "user1", "user0"]
    assert listed("q=USER3@") == ["user3"]
    assert listed("q=user%003") == ["user3"]
    page = api("get", "suppressions?limit=2").json()
    assert listed(f"limit=2&before={page['next']}") == ["user2", "user1"]
    assert api("get", "suppressions?limit=5").json()["next"] is None


@pytest.mark.parametrize("field", ["to", "cc", "bcc"])
def test_suppressed_recipient_is_named_in_the_error(api, user, field):
    Suppression.objects.create(owner=user, address="mallory@example.org")
    answer = api("post", "emails", GOOD | {"to": ["a@b.org"]} | {field: ["Mallory@Example.org"]})
    assert answer.status_code == 422
    assert answer.json()["errors"] == {field: ["Mallory@Example.org is suppressed"]}
    assert not Email.objects.exists()


def test_suppressed_recipient_is_skipped_with_skip_suppressed(api, user, mailbox):
    Suppression.objects.create(owner=user, address="bob@example.org")
    accepted = api("post", "emails", GOOD | {"skip_suppressed": True})
    assert accepted.status_code == 202
    shown = api("get", f"emails/{accepted.json()['id']}").json()
    assert shown["state"] == "queued"
    assert [each["state"] for each in shown["recipients"]] == ["skipped", "queued"]
    assert shown["recipients"][0]["next_attempt_at"] is None
    deliver(*Delivery.objects.values_list("pk", flat=True))
    assert [message.rcpt_tos for message in mailbox.messages] == [["eve@example.org"]]
    assert [each.state for each in Delivery.objects.all()] == ["skipped", "sent"]


def test_email_with_only_skipped_recipients_is_accepted(api, user):
    for address in GOOD["to"]:
        Suppression.objects.create(owner=user, address=address)
    accepted = api("post", "emails", GOOD | {"skip_suppressed": True})
    assert accepted.status_code == 202
    assert api("get", f"emails/{accepted.json()['id']}").json()["state"] == "skipped"


def test_suppression_applies_to_one_owner(api, user, other_user):
    project = Suppression.objects.create(owner=None, address="eve@example.org")
    own = Suppression.objects.create(owner=user, address="bob@example.org")
    assert api("post", "emails", GOOD, key=OTHER_KEY).status_code == 202
    answer = api("post", "emails", GOOD)
    assert answer.json()["errors"] == {"to": ["bob@example.org is suppressed"]}
    assert api("delete", f"suppressions/{own.pk}", key=OTHER_KEY).status_code == 404
    assert api("delete", f"suppressions/{project.pk}").status_code == 404
    assert Suppression.objects.count() == 2


def test_repeated_request_gets_its_id_even_if_the_recipient_is_suppressed_now(api, user):
    key = {"Idempotency-Key": "order 17"}
    first = api("post", "emails", GOOD, **key)
    Suppression.objects.create(owner=user, address="bob@example.org")
    assert api("post", "emails", GOOD, **key).json() == first.json()


def test_batch_refuses_only_emails_to_suppressed_recipients(api, user):
    Suppression.objects.create(owner=user, address="bob@example.org")
    emails = [GOOD, GOOD | {"to": ["eve@example.org"]}, GOOD | {"skip_suppressed": True}]
    results = api("post", "emails/batch", {"emails": emails}).json()["results"]
    assert [result["status"] for result in results] == [422, 202, 202]
    assert results[0]["errors"] == {"to": ["bob@example.org is suppressed"]}


# From refusals


@pytest.mark.parametrize(
    ("reply", "suppressed"),
    [
        ("550 no such user", True),
        ("550 5.1.1 no such user", True),
        ("550 5.7.1 message refused by policy", False),
        ("552 5.2.2 mailbox full", False),
        ("450 4.2.1 not now", False),
        ("451 no such user yet", False),
        ("450 5.1.1 no such user yet", False),
    ],
)
def test_nonexistent_recipient_is_suppressed(api, accept, mailbox, reply, suppressed):
    mailbox.recipient_reply = reply
    deliver(accept(recipients=["Bob@Example.org"]).deliveries.get().pk)
    found = api("get", "suppressions").json()["suppressions"]
    assert [each["address"] for each in found] == ["bob@example.org"] * suppressed
    if suppressed:
        assert found[0]["reason"] == "refused"
        assert reply.partition(" ")[2] in found[0]["detail"]
        answer = api("post", "emails", GOOD)
        assert answer.json()["errors"] == {"to": ["bob@example.org is suppressed"]}


def test_refused_message_suppresses_no_address(accept, mailbox):
    mailbox.reply = "550 5.1.1 no such user"
    delivery = accept().deliveries.get()
    deliver(delivery.pk)
    assert Delivery.objects.get().state == State.FAILED
    assert not Suppression.objects.exists()


def test_refusal_does_not_change_a_manual_suppression(accept, mailbox, user):
    email = accept()
    Suppression.objects.create(owner=user, address="bob@example.org")
    mailbox.recipient_reply = "550 no such user"
    deliver(email.deliveries.get().pk)
    assert Suppression.objects.get().reason == "manual"
    assert email.deliveries.get().state == State.FAILED


def test_project_emails_skip_suppressed_recipients(api, accept, mailbox):
    """Django's mail functions raise no error, because their caller could not handle it."""
    mailbox.recipient_reply = "550 no such user"
    deliver(accept(owner=None).deliveries.get().pk)
    assert Suppression.objects.get().owner is None
    send_mail("Hello", "Body", None, ["bob@example.org", "eve@example.org"])
    skipped = {each.recipient: each.state for each in Email.objects.first().deliveries.all()}
    assert skipped == {"bob@example.org": "skipped", "eve@example.org": "queued"}
    assert api("post", "emails", GOOD).status_code == 202, "another owner must not be affected"


def test_admin_stores_an_address_once_and_in_lower_case(admin_client, user):
    def add(owner, address):
        data = {"owner": owner, "address": address, "reason": "manual", "detail": ""}
        return admin_client.post("/admin/emails/suppression/add/", data).status_code

    assert add(user.pk, "Bob@Example.org") == 302
    assert add(user.pk, "bob@EXAMPLE.org") == 200, "the form with an error"
    assert add("", "BOB@example.org") == 302
    assert add("", "bob@example.org") == 200
    assert add("", "bob") == 200
    assert set(Suppression.objects.values_list("address", "owner")) == {
        ("bob@example.org", user.pk),
        ("bob@example.org", None),
    }
