"""Tests how attempts are classified by the mail server's replies."""

import smtplib
import socket

import pytest

from emails import smtp, smtp_replies
from emails.models import Delivery
from emails.states import State
from emails.tasks import deliver

REFUSED, DEFERRED, UNCERTAIN = State.FAILED, State.DEFERRED, State.UNCERTAIN


def recipient(code: int) -> smtplib.SMTPRecipientsRefused:
    return smtplib.SMTPRecipientsRefused({"bob": (code, b"no")})


@pytest.mark.parametrize(
    ("error", "data_sent", "state", "code"),
    [
        (smtplib.SMTPSenderRefused(499, b"no", "me"), False, DEFERRED, 499),
        (smtplib.SMTPSenderRefused(500, b"no", "me"), False, REFUSED, 500),
        (recipient(450), False, DEFERRED, 450),
        (recipient(550), False, REFUSED, 550),
        (smtplib.SMTPDataError(451, b"no"), True, DEFERRED, 451),
        (smtplib.SMTPDataError(554, b"no"), True, REFUSED, 554),
        (smtplib.SMTPDataError(-1, b""), True, UNCERTAIN, None),
        (smtplib.SMTPAuthenticationError(535, b"no"), False, DEFERRED, 535),
        (smtplib.SMTPConnectError(554, b"no"), False, DEFERRED, 554),
        (smtplib.SMTPHeloError(550, b"no"), False, DEFERRED, 550),
        (smtplib.SMTPNotSupportedError("no TLS"), False, DEFERRED, None),
        (smtplib.SMTPServerDisconnected("gone"), False, DEFERRED, None),
        (smtplib.SMTPServerDisconnected("gone"), True, UNCERTAIN, None),
        (TimeoutError(), False, DEFERRED, None),
        (TimeoutError(), True, UNCERTAIN, None),
        (ConnectionResetError(), True, UNCERTAIN, None),
        (ConnectionRefusedError(), True, DEFERRED, None),
        (socket.gaierror(), True, DEFERRED, None),
    ],
)
def test_error_is_classified(error, data_sent, state, code):
    result = smtp_replies.classify_error(error, data_sent)
    assert (result.state, result.code) == (state, code)


@pytest.mark.parametrize(
    ("code", "reply", "expected"),
    [
        (550, "no", True),
        (551, "no", True),
        (553, "no", True),
        (552, "mailbox full", False),
        (554, "no", False),
        (450, "5.1.1 no", False),
        (554, "5.1.1 unknown user", True),
        (554, "5.1.10 null MX", True),
        (550, "5.2.1 disabled", True),
        (550, "5.2.2 full", False),
        (550, "5.7.1 policy", False),
        (550, "5.1.8 bad sender", False),
        (550, "5.1.11 no such code", False),
    ],
)
def test_only_a_reply_about_the_address_means_no_such_recipient(code, reply, expected):
    assert smtp_replies.no_such_recipient(code, reply) is expected
    error = smtplib.SMTPRecipientsRefused({"bob": (code, reply.encode())})
    assert smtp_replies.classify_error(error, False).no_such_recipient is expected
    assert not smtp_replies.classify_error(
        smtplib.SMTPDataError(code, reply), True
    ).no_such_recipient


@pytest.mark.django_db
@pytest.mark.parametrize("mailbox", [True, False], indirect=True, ids=["pipelining", "plain"])
def test_connection_is_replaced_after_its_maximum_of_messages(accept, mailbox, monkeypatch):
    monkeypatch.setattr(smtp, "MESSAGES_PER_CONNECTION", 2)
    for count, connections in ((1, 1), (2, 1), (3, 2)):
        deliver(accept().deliveries.get().pk)
        assert (len(mailbox.messages), mailbox.connections) == (count, connections)
    assert set(Delivery.objects.values_list("state", flat=True)) == {State.SENT}
