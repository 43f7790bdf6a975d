import logging
import sys
from datetime import timedelta
from email import message_from_bytes, policy

import pytest
from django.utils import timezone

from emails import smtp
from emails.models import Delivery, Email, State
from emails.tasks import deliver
from mailroom.log import OneLineFormatter

pytestmark = pytest.mark.django_db


def run(delivery: Delivery) -> Delivery:
    deliver(delivery.pk)
    delivery.refresh_from_db()
    return delivery


def test_sends_one_message_to_each_recipient(accept, mailbox):
    email = accept(
        subject="Grüße", html="<p>Body</p>", recipients=["bob@example.org", "eve@example.org"]
    )
    for delivery in email.deliveries.all():
        assert run(delivery).state == State.SENT
        assert (delivery.attempts, delivery.last_smtp_code) == (1, 250)
        assert delivery.sent_at is not None
    assert [message.rcpt_tos for message in mailbox.messages] == [
        ["bob@example.org"],
        ["eve@example.org"],
    ]
    message = message_from_bytes(mailbox.messages[0].content, policy=policy.default)
    first = email.deliveries.first()
    assert message["Subject"] == "Grüße"
    assert message["To"] == "bob@example.org"
    assert message["From"] == "Mailroom <mailroom@example.org>"
    assert message["Message-ID"] == f"<{email.pk}.{first.pk}@example.org>"
    assert message.get_body(("plain",)).get_content().strip() == "Body"
    assert message.get_body(("html",)).get_content().strip() == "<p>Body</p>"


def test_two_copies_of_a_message_send_once(delivery, mailbox):
    run(delivery)
    assert run(delivery).attempts == 1
    assert len(mailbox.messages) == 1


def test_a_message_for_a_row_that_is_gone_is_nothing(db, mailbox):
    deliver(4711)
    assert mailbox.messages == []


@pytest.mark.parametrize("stage", ["reply", "recipient_reply"])
def test_a_temporary_refusal_defers(delivery, mailbox, stage):
    setattr(mailbox, stage, "451 try again later")
    before = timezone.now()
    assert run(delivery).state == State.DEFERRED
    assert delivery.last_smtp_code == 451
    assert "try again later" in delivery.last_error
    assert timedelta(seconds=10) < delivery.next_attempt_at - before < timedelta(seconds=40)
    assert delivery.lease_until is None

    mailbox.reply = mailbox.recipient_reply = "250 taken"
    assert run(delivery).state == State.DEFERRED, "a stray copy must not send before its time"
    Delivery.objects.update(next_attempt_at=timezone.now())
    Delivery.objects.lease(delivery.pk)
    assert run(delivery).state == State.SENT
    assert (delivery.attempts, delivery.last_error) == (2, "")


@pytest.mark.parametrize("stage", ["reply", "recipient_reply"])
def test_a_permanent_refusal_fails(delivery, mailbox, stage):
    setattr(mailbox, stage, "550 no such user")
    assert run(delivery).state == State.FAILED
    assert delivery.last_smtp_code == 550
    assert "no such user" in delivery.last_error
    assert not Delivery.objects.due().exists()


def test_a_server_that_is_away_defers(delivery):
    assert run(delivery).state == State.DEFERRED
    assert delivery.last_smtp_code is None
    assert "ConnectionRefusedError" in delivery.last_error


def test_a_slow_server_is_left_after_the_timeout(delivery, mailbox, settings):
    settings.EMAIL_TIMEOUT = 1
    mailbox.gate.clear()
    assert run(delivery).state == State.DEFERRED
    assert "timed out" in delivery.last_error


def test_gives_up_at_the_deadline(delivery):
    Email.objects.update(created_at=timezone.now() - timedelta(hours=23, minutes=59, seconds=50))
    assert run(delivery).state == State.FAILED


def test_delays_double_up_to_an_hour():
    delays = [smtp.retry_delay(attempts).total_seconds() for attempts in (1, 2, 3, 50)]
    for delay, longest in zip(delays, (30, 60, 120, 3600), strict=True):
        assert longest / 2 <= delay <= longest


def test_an_outcome_after_the_lease_was_lost_changes_nothing(delivery):
    late = Delivery.objects.claim(delivery.pk)
    Delivery.objects.update(state=State.QUEUED)
    current = Delivery.objects.claim(delivery.pk)
    assert not late.record(State.FAILED)
    delivery.refresh_from_db()
    assert delivery.state == State.SENDING
    assert current.record(State.DEFERRED)


def test_logs_name_the_email_but_no_address_and_no_body(delivery, mailbox, caplog):
    mailbox.recipient_reply = "550 bob@example.org is unknown"
    with caplog.at_level(logging.DEBUG):
        run(delivery)
    (record,) = (record for record in caplog.records if record.name == "emails.tasks")
    assert OneLineFormatter().format(record).endswith(f"code 550 email={delivery.email_id}")
    assert "bob" not in caplog.text
    assert "Body" not in caplog.text


def test_a_traceback_is_logged_on_one_line():
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    line = OneLineFormatter().format(record)
    assert "\n" not in line
    assert "second" in line
