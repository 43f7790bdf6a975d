"""Attacks with the content of an email: more recipients, other senders, other headers."""

from __future__ import annotations

import uuid

import pytest

EVIL = "victim@evil.test"
BREAKS = ["\n", "\r", "\r\n", "\n\r", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\0", "\r\n\r\n"]
NAMES = {"\n": "LF", "\r": "CR", "\r\n": "CRLF", "\n\r": "LFCR", "\r\n\r\n": "two CRLF"}


def line(field, text):
    """A value for a field that contains a string that would begin a header."""
    return {
        "subject": {"subject": f"x{text}Bcc: {EVIL}"},
        "sender": {"from": f"news@example.org{text}Bcc: {EVIL}"},
        "sender's name": {"from": f"News{text}Bcc: {EVIL} <news@example.org>"},
        "recipient": {"to": [f"one@example.net{text}Bcc: {EVIL}"]},
        "cc": {"cc": [f"one@example.net{text}RCPT TO:<{EVIL}>"]},
        "bcc": {"bcc": [f"one@example.net{text}"]},
        "reply to": {"reply_to": [f"One{text}Bcc: {EVIL} <one@example.net>"]},
        "value of a header": {"headers": {"X-Own": f"x{text}Bcc: {EVIL}"}},
        "name of a header": {"headers": {f"X-Own: x{text}Bcc": EVIL}},
        "file name": {"attachments": [{"filename": f"a{text}Bcc: {EVIL}", "content": ""}]},
        "content type": {"attachments": [{"filename": "a", "content_type": f"text/plain{text}Bcc: {EVIL}", "content": ""}]},
    }[field]


FIELDS = ["subject", "sender", "sender's name", "recipient", "cc", "bcc", "reply to", "value of a header", "name of a header"]


@pytest.mark.attack(kind="email: header injection")
@pytest.mark.parametrize("text", BREAKS, ids=[NAMES.get(text, repr(text)) for text in BREAKS])
@pytest.mark.parametrize("field", [*FIELDS, "file name", "content type"])
def test_line_break_in_a_header_is_refused(post, field, text):
    answer = post(**line(field, text))
    assert answer.status_code == 422, answer.text


ADDRESSES = [
    "a@evil.test@example.net",
    '"a@evil.test"@example.net',
    '"a b"@example.net',
    "a@example.net,victim@evil.test",
    "a@example.net;victim@evil.test",
    "a@example.net victim@evil.test",
    "<a@example.net>",
    "A <a@example.net>",
    "group: a@example.net, victim@evil.test;",
    "a@exam\u00adple.net",
    "a@\u24d4vil.test",
    "a@evil\u3002test",
    "a@example.net\u202e",
    "a@[127.0.0.1",
    "a@localhost\\@example.net",
    "a@-example.net",
    "a@example..net",
    ".a@example.net",
    "a" * 65 + "@example.net",
    "a@" + "b" * 64 + ".net",
    "a@" + ".".join(["b" * 60] * 5) + ".net",
    "@evil.test:a@example.net",
    "a%evil.test@",
    "=?utf-8?q?a=40evil.test?=",
    "",
    " ",
]


@pytest.mark.attack(kind="email: address injection")
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("field", ["to", "cc", "bcc"])
def test_ambiguous_recipient_is_refused(post, field, address):
    answer = post(**{"to": ["one@example.net"], field: [address]})
    assert answer.status_code == 422, answer.text


SENDERS = [
    "boss@evil.test",
    "boss@example.org.evil.test",
    "boss@evil.test, news@example.org",
    "boss@evil.test <news@example.org>, x@evil.test",
    "news@example.org <boss@evil.test>",
    "<news@example.org> <boss@evil.test>",
    "boss@evil.test (news@example.org)",
    '"news@example.org" <boss@evil.test>',
    "group: news@example.org;",
    "news@example.org\u0000",
    "news@\u0435xample.org",
    "@example.org",
    "example.org",
    "<news@example.org",
    "news@example.org> <boss@evil.test>",
    "=?utf-8?q?boss=40evil.test?= <boss@evil.test>",
]


@pytest.mark.attack(kind="email: forged sender")
@pytest.mark.parametrize("sender", SENDERS)
def test_sender_that_is_not_allowed_is_refused(post, sender):
    answer = post(**{"from": sender})
    assert answer.status_code == 422, answer.text


OWN = [
    "Bcc",
    "bcc",
    "BCC",
    "From",
    "To",
    "Cc",
    "Sender",
    "Reply-To",
    "Return-Path",
    "Received",
    "Message-ID",
    "Date",
    "DKIM-Signature",
]
OWN += ["Content-Type", "MIME-Version", "Content-Transfer-Encoding", "Subject", "", " ", "X Own", "X-Own:", "\u00e9", "X-\u00e9"]


@pytest.mark.attack(kind="email: forged header")
@pytest.mark.parametrize("name", OWN)
def test_header_of_another_field_is_refused(post, name):
    assert post(headers={name: EVIL}).status_code == 422


END = "MAIL FROM:<boss@evil.test>|RCPT TO:<victim@evil.test>|DATA|Subject: smuggled||x|"
TEXTS = {
    "end of the data": "x\r\n.\r\n" + END.replace("|", "\r\n") + ".\r\n",
    "LF dot LF": "x\n.\n" + END.replace("|", "\n") + ".\n",
    "CR dot CR": "x\r.\r" + END.replace("|", "\r") + ".\r",
    "LF dot CRLF": "x\n.\r\n" + END.replace("|", "\r\n") + ".\r\n",
    "CR LF dot CR": "x\r\n.\r" + END.replace("|", "\r\n") + ".\r\n",
    "boundary": "--===============\r\nContent-Type: text/html\r\nSubject: smuggled\r\n\r\n<b>x</b>",
    "header in the body": "Bcc: victim@evil.test\r\nSubject: smuggled\r\n\r\nx",
    "long line": "x" * 100_000 + "\r\n.\r\nSubject: smuggled",
    "dots": "\n".join("." * number for number in range(1, 50)),
}


@pytest.mark.attack(kind="email: SMTP smuggling")
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("field", ["text", "html"])
def test_body_remains_a_body(post, mails, eventually, field, text):
    subject = uuid.uuid4().hex
    before = len(mails("smuggled"))
    assert post(**{"subject": subject, "text": "x", field: text}).status_code == 202
    eventually(lambda: len(mails(subject)) == 1)
    mail = mails(subject)[0]
    assert [each["address"] for each in mail["envelope"]["to"]] == ["one@example.net"]
    assert len(mails("smuggled")) == before
    assert "bcc" not in {name.lower() for name in mail["headers"]}


ENCODED = [
    "=?utf-8?q?x=0D=0ABcc:_victim@evil.test?=",
    "=?utf-8?b?eA0KQmNjOiB2aWN0aW1AZXZpbC50ZXN0?=",
    "=0D=0ABcc: victim@evil.test",
    "\\r\\nBcc: victim@evil.test",
    "%0d%0aBcc: victim@evil.test",
    "\u010aBcc: victim@evil.test",
    "\uff0aBcc: victim@evil.test",
]


@pytest.mark.attack(kind="email: header injection")
@pytest.mark.parametrize("text", ENCODED)
def test_encoded_line_break_begins_no_header(post, mails, variables, eventually, text):
    mark = uuid.uuid4().hex
    answer = post(**{"subject": mark, "from": f"{mark} <news@example.org>", "headers": {"X-Own": text}, "text": text})
    assert answer.status_code == 202, answer.text
    eventually(lambda: len(mails(mark)) == 1)
    mail = mails(mark)[0]
    assert [each["address"] for each in mail["envelope"]["to"]] == ["one@example.net"]
    assert "bcc" not in {name.lower() for name in mail["headers"]}
