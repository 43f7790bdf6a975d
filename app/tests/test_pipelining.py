"""A server with PIPELINING gets the next email's commands together with the end of a message."""

import smtplib

import pytest

from emails import deliveries, delivering, messages, smtp
from emails.delivering import Sender
from emails.models import Delivery
from emails.states import State
from emails.tasks import deliver
from tests.tools import claim

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.parametrize("mailbox", [True], indirect=True, ids=["pipelining"]),
]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Sets the pace of a fast server, so that a worker claims several emails at a time."""
    monkeypatch.setattr(Sender, "pace", 0.001)
    monkeypatch.setattr(Sender, "chunk_size", classmethod(lambda cls: delivering.LARGEST_CHUNK))


@pytest.fixture
def send(accept):
    """Sends the given number of emails with one queue message; returns their states."""

    def send(count: int) -> list[str]:
        ids = [accept(subject=f"Number {n}").deliveries.get().pk for n in range(count)]
        deliver(*ids)
        return list(Delivery.objects.order_by("pk").values_list("state", flat=True))

    return send


def subjects(mailbox) -> list[str]:
    return [
        message.content.split(b"Subject: ")[1].split(b"\r\n")[0] for message in mailbox.messages
    ]


def test_ten_emails_take_eleven_round_trips(send, mailbox, monkeypatch):
    writes, write = [], smtplib.SMTP.send
    monkeypatch.setattr(
        smtplib.SMTP, "send", lambda self, data: writes.append(data) or write(self, data)
    )
    assert send(10) == [State.SENT] * 10
    assert len(writes) == 12  # the greeting, the first commands, ten messages
    assert subjects(mailbox) == [f"Number {n}".encode() for n in range(10)]
    assert mailbox.connections == 1


def test_refused_message_does_not_affect_the_next(send, mailbox):
    mailbox.replies = ["250 taken", "550 no", "451 later", "250 taken"]
    assert send(4) == [State.SENT, State.FAILED, State.DEFERRED, State.SENT]
    assert mailbox.connections == 1


def test_disconnect_makes_only_one_email_uncertain(send, mailbox):
    mailbox.replies = ["250 taken", None]
    assert send(4) == [State.SENT, State.UNCERTAIN, State.SENT, State.SENT]
    assert mailbox.connections == 2


def test_421_at_the_end_of_a_session_costs_no_attempt(send, mailbox):
    mailbox.sender_replies = ["250 fine", "421 enough for now"]
    assert send(3) == [State.SENT] * 3
    assert set(Delivery.objects.values_list("attempts", flat=True)) == {1}
    assert mailbox.connections == 2


def test_announced_email_that_another_worker_has_is_not_sent(send, mailbox, monkeypatch):
    record = deliveries.record

    def lose_the_second(ended, begin=()):
        if len(begin) > 2:
            Delivery.objects.filter(pk=begin[1].id).update(state=State.QUEUED)
        return record(ended, begin)

    monkeypatch.setattr(deliveries, "record", lose_the_second)
    send(3)
    assert subjects(mailbox) == [b"Number 0", b"Number 2"]


def test_connection_that_expects_a_message_gets_no_quit(send, mailbox, monkeypatch):
    """The server would read QUIT as the message."""
    writes = []

    def stop(self, claimed):
        result = self_result(self, claimed)
        smtp.close()
        return result

    self_result = Sender.result
    monkeypatch.setattr(Sender, "result", stop)
    monkeypatch.setattr(smtplib.SMTP, "quit", lambda self: writes.append("quit"))
    assert send(2) == [State.SENT] * 2
    assert writes == ["quit"], "after the last email only"
    assert mailbox.connections == 2


def test_connection_that_expects_one_email_is_not_used_for_another(accept, mailbox):
    def envelope(subject: str) -> smtp.Envelope:
        delivery = claim(accept(subject=subject).deliveries.get())
        message = messages.build(delivery)
        content = messages.as_bytes(message)
        return smtp.Envelope(delivery.sender, delivery.recipient, content, message)

    first, announced, other = (envelope(f"Number {n}") for n in range(3))
    assert smtp.send(first, lambda: True, upcoming=announced).state == State.SENT
    assert smtp.send(other, lambda: True).state == State.SENT
    assert subjects(mailbox) == [b"Number 0", b"Number 2"]
    assert mailbox.connections == 2
