import json
import logging
import sys
from datetime import timedelta
from email import message_from_bytes, policy

import pytest
from django.utils import timezone

from emails import context, models
from emails.models import Delivery, Email, State
from emails.tasks import deliver
from mailroom.log import JsonFormatter, OneLineFormatter

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
    assert timedelta(0) < delivery.due_at - before < timedelta(seconds=40)

    mailbox.reply = mailbox.recipient_reply = "250 taken"
    assert run(delivery).state == State.DEFERRED, "a stray copy must not send before its time"
    Delivery.objects.update(due_at=timezone.now())
    Delivery.objects.lease(1)
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


def test_gives_up_at_the_deadline(delivery, monkeypatch):
    Email.objects.update(created_at=timezone.now() - timedelta(hours=23, minutes=59, seconds=50))
    monkeypatch.setattr(models.random, "random", lambda: 1)
    assert run(delivery).state == State.FAILED
    assert delivery.due_at is None


def test_delays_are_anywhere_in_a_range_that_doubles_up_to_an_hour(monkeypatch):
    for share in (0, 0.5, 1):
        monkeypatch.setattr(models.random, "random", lambda share=share: share)
        delays = [models.retry_delay(attempts).total_seconds() for attempts in (1, 2, 3, 50)]
        assert delays == [share * longest for longest in (30, 60, 120, 3600)]


def test_an_outcome_after_the_lease_was_lost_changes_nothing(delivery):
    late = Delivery.objects.claim(delivery.pk)
    Delivery.objects.update(state=State.QUEUED)
    current = Delivery.objects.claim(delivery.pk)
    assert not late.record(State.FAILED, code=550, answer="", seconds=1)
    delivery.refresh_from_db()
    assert delivery.state == State.SENDING
    assert current.record(State.DEFERRED, code=451, answer="", seconds=1, due_at=timezone.now())


def test_logs_name_the_email_but_no_address_and_no_body(delivery, mailbox, caplog):
    mailbox.recipient_reply = "550 bob@example.org is unknown"
    caplog.handler.addFilter(context.AddIds())
    with caplog.at_level(logging.DEBUG):
        run(delivery)
    (record,) = (record for record in caplog.records if record.name == "emails.tasks")
    ids = f"email={delivery.email_id} delivery={delivery.pk}"
    assert OneLineFormatter().format(record).endswith(f"code 550 {ids}")
    fields = json.loads(JsonFormatter().format(record))
    assert fields["message"] == "failed after attempt 1, SMTP code 550"
    assert (fields["email"], fields["delivery"]) == (str(delivery.email_id), str(delivery.pk))
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
