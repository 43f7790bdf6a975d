"""Tests the validation of emails. Limits are tested at their exact values."""

import base64
import time
from email import message_from_bytes, policy

import pytest
from django.conf import settings as django_settings

from emails import validation
from emails.models import Attachment, Delivery, Email
from emails.tasks import deliver

pytestmark = pytest.mark.django_db

GOOD = {"subject": "Hello", "text": "Body", "to": ["bob@example.org"]}
SHY = "\u00ad"  # the soft hyphen


@pytest.fixture
def post(api):
    return lambda **fields: api("post", "emails", GOOD | fields)


def wrong_fields(answer) -> list[str]:
    return list(answer.json()["errors"]) if answer.status_code == 422 else []


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "bob@example.org",
        "BOB@Example.ORG",
        "o'brien+lists=x@mail.example.co.uk",
        "a.b-c_d/e@example.org",
        "x" * 64 + "@example.org",
        "bob@b\u00fccher.example",
        "bob@B\u00dcCHER.example",
        "bob@xn--bcher-kva.example",
        "bob@\u65e5\u672c\u8a9e.jp",
        "bob@[192.0.2.1]",
    ],
)
def test_accepts_an_ordinary_address(post, address):
    assert post(to=[address]).status_code == 202
    assert Delivery.objects.get().recipient == address


BAD_ADDRESSES = [
    "x" * 65 + "@example.org",
    '"a@evil"@example.org',
    '"a b"@example.org',
    '"bob"@example.org',
    f"bob@exam{SHY}ple.org",
    f"bo{SHY}b@example.org",
    f"bob@b\u00fc{SHY}cher.example",
    "bob@\uff45xample.org",  # a fullwidth e
    "\uff42ob@example.org",
    "bob@stra\u00dfe.example",
    "bob@\u03b2\u03cc\u03bb\u03bf\u03c2.example",  # with a final sigma
    "bob@\u212a.example",  # the kelvin sign
    "bob@bu\u0308cher.example",  # u with a combining diaeresis
    "bob@ex\u200bample.org",  # a zero-width space
    "bob@example\u3002org",  # a full stop of another script
    "bob@" + "\u00fc" * 60 + ".example",  # a label over 63 bytes
    "bob@" + ("\u65e5\u672c\u8a9e" * 6 + ".") * 8 + "example",  # over 254 bytes in ASCII
    "bob@example.org.",
    "bob..x@example.org",
    "a@b@example.org",
    "Friends: bob@example.org;",
    "bob@example.org (Bob)",
]


@pytest.mark.attack(kind="email: address injection")
@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_refuses_an_address_that_mail_servers_refuse_or_interpret_differently(post, address):
    assert wrong_fields(post(to=[address])) == ["to"]
    assert wrong_fields(post(cc=[address])) == ["cc"]
    assert wrong_fields(post(reply_to=[address])) == ["reply_to"]
    assert not Email.objects.exists()


@pytest.mark.parametrize(
    "sender",
    [
        "news@example.com",
        "<news@example.com>",
        "News <news@example.com>",
        "News<news@example.com>",
        '"Last, First" <news@example.com>',
        '"News: daily" <news@example.com>',
        '"eve@example.org" <news@example.com>',
        "B\u00fccher <news@example.com>",
        "Shop.example <news@example.com>",
        "Dr. A. B. O'Neil <news@example.com>",
        "News (daily) <news@example.com>",
    ],
)
def test_sender_may_have_a_name(post, mailbox, sender):
    assert post(**{"from": sender, "reply_to": [sender]}).status_code == 202
    deliver(Delivery.objects.get().pk)
    (sent,) = mailbox.messages
    assert sent.mail_from == "news@example.com"
    message = message_from_bytes(sent.content, policy=policy.default)
    for header in ("From", "Reply-To"):
        assert [each.addr_spec for each in message[header].addresses] == ["news@example.com"]


@pytest.mark.attack(kind="email: forged sender")
@pytest.mark.parametrize(
    "sender",
    [
        "Friends: news@example.com, mailroom@example.org;",
        "Friends: news@example.com;",
        "Friends: News <news@example.com>",
        "News @ Home <news@example.com>",
        "undisclosed-recipients:;",
        "news@example.com, mailroom@example.org",
        "news@example.com mailroom@example.org",
        "Last, First <news@example.com>",
        "News <news@example.com",
        "News <>",
        "News <news@example.com> more",
        "News <news@example.com> (more)",
        "News <news@example.com>,",
        "news@example.com (<eve@evil.example>)",
        "News <@relay.example:news@example.com>",
        'News <"a@evil"@example.com>',
        f"News <news@exam{SHY}ple.com>",
        "News <eve@evil.example> <news@example.com>",
        " news@example.com",
    ],
)
def test_refuses_anything_but_one_sender(post, sender):
    assert wrong_fields(post(**{"from": sender})) == ["from"]
    assert wrong_fields(post(reply_to=[sender])) == ["reply_to"]


# Headers


def test_further_headers_arrive_unchanged(post, mailbox):
    headers = {
        "List-Unsubscribe": f"<https://example.org/u/{'x' * 200}>, <mailto:u@example.org>",
        "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
        "X-Campaign": "Gr\u00fc\u00dfe",
    }
    assert post(headers=headers).status_code == 202
    deliver(Delivery.objects.get().pk)
    message = message_from_bytes(mailbox.messages[0].content, policy=policy.default)
    assert {name: message[name].strip() for name in headers} == headers


@pytest.mark.attack(kind="email: forged header")
@pytest.mark.parametrize(
    "name",
    [
        *("From", "from", "To", "Cc", "Bcc", "bcc", "BCC", "Reply-To", "Subject", "Date"),
        *("Message-ID", "Message-Id", "Sender", "Return-Path", "Received", "MIME-Version"),
        *("Content-Type", "Content-Transfer-Encoding", "DKIM-Signature"),
        *("", "X Y", "X:", "X-\u00fc", "X\n", "X" * 77),
    ],
)
def test_refuses_reserved_and_invalid_header_names(post, name):
    assert wrong_fields(post(headers={name: "value"})) == ["headers"]
    assert not Email.objects.exists()


@pytest.mark.attack(kind="email: header injection")
@pytest.mark.parametrize(
    "headers",
    [
        {"X-A": "a\r\nBcc: eve@example.org"},
        {"X-A": "a\nBcc: eve@example.org"},
        {"X-A": "a\u2028b"},
        {"X-A": "a\0"},
        {"X-A": "a" * 999},
        {"X-A": 7},
        {"X-A": "a", "x-a": "b"},
        {"x-a": "a", "X-A": "b"},
        {f"X-{number}": "a" for number in range(51)},
        ["X-A"],
    ],
)
def test_refuses_invalid_headers(post, headers):
    assert wrong_fields(post(headers=headers)) == ["headers"]


# Number and size


@pytest.mark.parametrize(("count", "status"), [(50, 202), (51, 422)])
def test_number_of_attachments_is_limited(post, count, status):
    attachments = [{"filename": "", "content": ""}] * count
    answer = post(attachments=attachments)
    assert answer.status_code == status
    assert wrong_fields(answer) == (["attachments"] if status == 422 else [])
    assert Attachment.objects.count() == (count if status == 202 else 0)


@pytest.mark.attack(kind="HTTP: body and JSON limits")
@pytest.mark.parametrize("way", ["emails", "emails/batch"])
def test_100_000_empty_attachments_are_refused_quickly(api, way):
    email = GOOD | {"attachments": [{"filename": "", "content": ""}] * 100_000}
    body = {"emails": [email]} if way == "emails/batch" else email
    started = time.process_time()
    answer = api("post", way, body)
    assert time.process_time() - started < 1
    result = answer.json()["results"][0] if way == "emails/batch" else answer.json()
    assert result["errors"] == {"attachments": ["must not be more than 50"]}


@pytest.mark.parametrize("field", ["to", "cc", "bcc"])
def test_too_many_recipients_are_refused_without_validating_each(post, monkeypatch, field):
    looked_at = []
    monkeypatch.setattr(validation, "check_address", looked_at.append)
    assert wrong_fields(post(**{field: [f"user{n}@example.org" for n in range(100)]})) == ["to"]
    assert set(looked_at) <= {"mailroom@example.org"}, "the sender"


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("part", ["text", "html", "attachment"])
def test_size_of_an_email_is_limited(post, settings, part, over):
    settings.EMAILS_MAX_EMAIL_BYTES = 1000
    fields = {"text": "\u00fc" * 50, "html": "\u00fc" * 50}  # 100 bytes each
    content = b"x" * 700
    rest = 100 + over
    if part == "attachment":
        content += b"x" * rest
    else:
        fields[part] += "x" * rest
    attachment = {"filename": "a.txt", "content": base64.b64encode(content).decode()}
    answer = post(**fields, attachments=[attachment])
    assert answer.status_code == (422 if over else 202)
    assert wrong_fields(answer) == (["attachments"] if over else [])


def test_request_may_be_as_large_as_an_email_in_base64(post):
    content = b"\xff" * (django_settings.EMAILS_MAX_EMAIL_BYTES * 99 // 100)
    attachment = {"filename": "a.bin", "content": base64.b64encode(content).decode()}
    assert post(attachments=[attachment]).status_code == 202
    assert len(Attachment.objects.get().content) == len(content)
