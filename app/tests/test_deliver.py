import json
import logging
import smtplib
import ssl
import subprocess
import sys
from datetime import timedelta
from email import message_from_bytes, policy

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from django.core import mail
from django.utils import timezone

from emails import context, deliveries, delivering, services, smtp
from emails.models import Counter, Delivery, Email
from emails.states import State
from emails.tasks import deliver
from emails.validation import File
from mailroom.log import JsonFormatter, OneLineFormatter
from tests.harness import free_port
from tests.tools import claim, due, end

pytestmark = pytest.mark.django_db


def pytest_generate_tests(metafunc):
    """Runs each test with a server that offers PIPELINING, and with a server that does not."""
    if "mailbox" in metafunc.fixturenames:
        kinds = {"argvalues": [False, True], "ids": ["plain", "pipelining"]}
        metafunc.parametrize("mailbox", indirect=True, **kinds)


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


def test_attempt_is_recorded(delivery, mailbox):
    for number, reply in enumerate(("451 wait", "250 taken", "550 no"), start=1):
        mailbox.reply = reply
        Delivery.objects.update(state=State.QUEUED, started_at=None)
        before = timezone.now()
        run(delivery)
        attempt = delivery.log.last()
        assert (attempt.number, attempt.outcome) == (number, delivery.state)
        assert before <= attempt.started_at == delivery.started_at <= timezone.now()
        assert 0 < attempt.seconds < 10
        assert attempt.smtp_code == delivery.last_smtp_code == int(reply[:3])
        assert attempt.answer.endswith(reply[4:])
        assert bool(delivery.due_at) == (reply == "451 wait")
        assert bool(delivery.last_error) == (reply != "250 taken")
        # The time at which the email was sent never changes.
        assert (delivery.sent_at is not None) == (number > 1)


def test_two_copies_of_a_message_send_once(delivery, mailbox):
    run(delivery)
    assert run(delivery).attempts == 1
    assert len(mailbox.messages) == 1


def test_message_for_a_deleted_row_is_ignored(db, mailbox):
    deliver(4711)
    assert mailbox.messages == []


def test_several_deliveries_of_a_message_are_sent_one_by_one(accept, mailbox):
    first, second = (accept().deliveries.get() for _ in range(2))
    deliver(first.pk, 4711, second.pk, first.pk)
    assert len(mailbox.messages) == 2
    for delivery in (first, second):
        delivery.refresh_from_db()
        assert (delivery.state, delivery.attempts) == (State.SENT, 1)


def test_slow_server_requeues_the_rest(accept, mailbox, settings, monkeypatch):
    monkeypatch.setattr(delivering.Sender, "pace", float("inf"))
    settings.EMAILS_SENDING_LEASE_SECONDS = 0
    waiting = [accept().deliveries.get() for _ in range(3)]
    deliveries.lease(3)
    deliver(*(delivery.pk for delivery in waiting))
    assert len(mailbox.messages) == 1, "at least one must be sent"
    assert set(due()) == set(waiting[1:])
    assert {delivery.attempts for delivery in due()} == {0}


@pytest.mark.parametrize("stage", ["reply", "recipient_reply"])
def test_temporary_refusal_defers(delivery, mailbox, stage):
    setattr(mailbox, stage, "451 try again later")
    before = timezone.now()
    assert run(delivery).state == State.DEFERRED
    assert delivery.last_smtp_code == 451
    assert "try again later" in delivery.last_error
    assert timedelta(0) < delivery.due_at - before < timedelta(seconds=40)

    mailbox.reply = mailbox.recipient_reply = "250 taken"
    assert run(delivery).state == State.DEFERRED, "a stray copy must not send before its time"
    Delivery.objects.update(due_at=timezone.now())
    deliveries.lease(1)
    assert run(delivery).state == State.SENT
    assert (delivery.attempts, delivery.last_error) == (2, "")


@pytest.mark.parametrize("stage", ["reply", "recipient_reply"])
def test_permanent_refusal_fails(delivery, mailbox, stage):
    setattr(mailbox, stage, "550 no such user")
    assert run(delivery).state == State.FAILED
    assert delivery.last_smtp_code == 550
    assert "no such user" in delivery.last_error
    assert not due().exists()


def test_refusal_counts_if_the_server_disconnects_after_it(delivery, mailbox):
    mailbox.sender_replies, mailbox.hangs_up = ["550 blocked"], True
    assert run(delivery).state == State.FAILED
    assert delivery.last_smtp_code == 550


def test_unreachable_server_defers(delivery):
    assert run(delivery).state == State.DEFERRED
    assert delivery.last_smtp_code is None
    assert "ConnectionRefusedError" in delivery.last_error


# Uncertain: the server may have accepted the message, but its reply did not arrive


def test_missing_reply_is_uncertain_and_retried(delivery, mailbox):
    mailbox.reply = None
    delivery = run(delivery)
    assert (delivery.state, delivery.uncertain_attempts) == (State.UNCERTAIN, 1)
    assert delivery.due_at > timezone.now() - timedelta(seconds=1)
    assert "SMTPServerDisconnected" in delivery.last_error
    assert len(mailbox.messages) == 1

    mailbox.reply = "250 taken"
    assert run(delivery).state == State.UNCERTAIN, "a stray copy must not send before its time"
    Delivery.objects.update(due_at=timezone.now())
    deliveries.lease(1)
    assert run(delivery).state == State.SENT
    ids = {message_from_bytes(message.content)["Message-ID"] for message in mailbox.messages}
    assert (len(mailbox.messages), len(ids)) == (2, 1)
    log = [(attempt.number, attempt.outcome) for attempt in delivery.log.all()]
    assert log == [(1, State.UNCERTAIN), (2, State.SENT)]


def test_uncertain_delivery_is_held_with_the_policy_hold(delivery, mailbox, settings):
    settings.EMAILS_UNCERTAIN_POLICY = "hold"
    mailbox.reply = None
    delivery = run(delivery)
    assert (delivery.state, delivery.due_at, delivery.needs_operator) == (
        State.UNCERTAIN,
        None,
        True,
    )
    assert not due().exists()
    assert services.replay(Delivery.objects.all()) == 1
    assert due().exists()


def test_late_reply_to_the_message_is_uncertain(delivery, mailbox, settings):
    settings.EMAIL_TIMEOUT = 1
    mailbox.gate.clear()
    assert run(delivery).state == State.UNCERTAIN
    mailbox.gate.set()


@pytest.mark.parametrize("stage", ["sender", "recipient"])
def test_connection_lost_before_the_message_is_not_uncertain(delivery, mailbox, stage):
    if stage == "sender":
        mailbox.sender_replies = [None]
    else:
        mailbox.recipient_reply = None
    delivery = run(delivery)
    assert (delivery.state, delivery.uncertain_attempts) == (State.DEFERRED, 0)
    assert mailbox.messages == []


def test_worker_without_the_lease_sends_nothing(delivery, mailbox, monkeypatch):
    """Another worker may have the delivery by now, for example after a clock jump."""
    introduce = smtp.send_commands

    def lose(*arguments):
        Delivery.objects.update(state=State.QUEUED)
        return introduce(*arguments)

    monkeypatch.setattr(smtp, "send_commands", lose)
    assert run(delivery).state == State.QUEUED
    assert mailbox.messages == []
    monkeypatch.undo()
    assert run(delivery).state == State.SENT
    assert len(mailbox.messages) == 1


# Connections


def test_connection_is_reused_for_many_emails(accept, mailbox):
    for _ in range(5):
        assert run(accept().deliveries.get()).state == State.SENT
    mailbox.recipient_reply = "550 5.7.1 not from you"
    assert run(accept().deliveries.get()).state == State.FAILED
    mailbox.recipient_reply = "250 fine"
    assert run(accept().deliveries.get()).state == State.SENT
    assert mailbox.connections == 1


@pytest.fixture
def sent(monkeypatch):
    """The data of each write by the SMTP client."""
    pieces, send = [], smtplib.SMTP.send

    def note(self, data):
        pieces.append(data)
        send(self, data)

    monkeypatch.setattr(smtplib.SMTP, "send", note)
    return pieces


def test_pipelining_server_gets_the_commands_in_one_write(delivery, mailbox, sent):
    assert run(delivery).state == State.SENT
    # The writes are the greeting, the commands and the message.
    assert len(sent) == (3 if mailbox.pipelining else 5)


def test_line_break_in_a_stored_address_injects_no_command(accept, mailbox, sent):
    delivery = accept(show_recipients=True).deliveries.get()
    delivery.kind, delivery.recipient = Delivery.Kind.BCC, "<,\r\nrcpt TO:<eve@example.org>"
    delivery.save()
    assert run(delivery).state != State.SENT
    assert "a line break" in delivery.last_error
    assert not [line for line in sent if "eve" in str(line)]


def test_message_for_a_refused_recipient_is_not_sent(accept, mailbox, sent):
    mailbox.lax, mailbox.recipient_reply = True, "550 5.7.1 not from you"
    assert run(accept().deliveries.get()).state == State.FAILED
    # After DATA, the server would read any command as the message.
    assert sent[-1].endswith("data\r\n" if mailbox.pipelining else "rset\r\n")
    assert "data\r\n" not in sent
    mailbox.recipient_reply = "250 fine"
    assert run(accept().deliveries.get()).state == State.SENT
    assert len(mailbox.messages) == 1


@pytest.mark.parametrize("reply", [None, "421 too many messages"])
def test_disconnect_of_a_reused_connection_costs_no_attempt(accept, mailbox, reply):
    run(accept().deliveries.get())
    delivery = accept().deliveries.get()
    mailbox.sender_replies = [reply]
    assert run(delivery).state == State.SENT
    assert (Delivery.objects.get(pk=delivery.pk).attempts, mailbox.connections) == (1, 2)


def test_idle_connection_is_replaced(accept, mailbox, monkeypatch):
    run(accept().deliveries.get())
    monkeypatch.setattr(smtp, "IDLE_SECONDS", -1)
    assert run(accept().deliveries.get()).state == State.SENT
    assert mailbox.connections == 2


@pytest.mark.filterwarnings("ignore:Requiring AUTH")  # aiosmtpd doesn't see the implicit TLS
@pytest.mark.parametrize("way", ["STARTTLS", "implicit"])
def test_logs_in_over_tls(accept, mailbox, settings, tmp_path, monkeypatch, way):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(certificate, key)

    def authenticate(server, session, envelope, mechanism, data):
        mailbox.credentials.append((data.login, data.password))
        return AuthResult(success=data.password == b"secret", handled=False)

    port = free_port()
    if way == "STARTTLS":
        options = {"tls_context": server_side, "require_starttls": True}
        settings.EMAIL_USE_TLS = True
    else:
        options = {"ssl_context": server_side, "auth_require_tls": False}
        settings.EMAIL_USE_SSL = True
    options |= {"authenticator": authenticate, "auth_required": True}
    server = Controller(mailbox, hostname="localhost", port=port, **options)
    server.start()
    settings.EMAIL_HOST, settings.EMAIL_PORT = "localhost", port
    settings.EMAIL_HOST_USER, settings.EMAIL_HOST_PASSWORD = "mailroom", "secret"
    try:
        delivery = run(accept().deliveries.get())
        assert delivery.state == State.DEFERRED, "the certificate is not trusted"
        assert "CERTIFICATE_VERIFY_FAILED" in delivery.last_error
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        settings.EMAIL_HOST_PASSWORD = "wrong"
        smtp.close()
        delivery = run(accept().deliveries.get())
        assert delivery.state == State.DEFERRED, "a failed login must not fail the delivery"
        assert delivery.last_smtp_code == 535
        settings.EMAIL_HOST_PASSWORD = "secret"
        smtp.close()
        assert run(accept().deliveries.get()).state == State.SENT
    finally:
        server.stop()
    assert mailbox.credentials[-1] == (b"mailroom", b"secret")


# Other backends


def test_any_email_backend_can_deliver(delivery, settings):
    settings.EMAILS_DELIVERY_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
    assert run(delivery).state == State.SENT
    (message,) = mail.outbox
    assert message.recipients() == ["bob@example.org"]


class ProviderError(Exception):
    """An error with an HTTP status, like those of django-anymail."""

    def __init__(self, status_code):
        super().__init__("no")
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ProviderError(422), State.FAILED),
        (ProviderError(429), State.DEFERRED),
        (ProviderError(401), State.DEFERRED),
        (ProviderError(503), State.DEFERRED),
        (ProviderError(504), State.UNCERTAIN),
        (ProviderError(None), State.UNCERTAIN),
        (TimeoutError(), State.UNCERTAIN),
        (ConnectionRefusedError(), State.DEFERRED),
    ],
)
def test_error_of_a_provider_is_classified_by_its_status(
    delivery, settings, monkeypatch, error, state
):
    settings.EMAILS_DELIVERY_BACKEND = "django.core.mail.backends.locmem.EmailBackend"

    def fail(*_):
        raise error

    monkeypatch.setattr("django.core.mail.backends.locmem.EmailBackend.send_messages", fail)
    assert run(delivery).state == state


# What the recipient sees


def headers(mailbox) -> list[tuple]:
    messages = [
        message_from_bytes(each.content, policy=policy.default) for each in mailbox.messages
    ]
    return [(message["To"], message["Cc"], message["Bcc"]) for message in messages]


def test_recipients_see_to_and_cc_but_never_bcc(accept, mailbox, settings):
    email = accept(recipients=["bob@example.org"], cc=["carl@example.org"], bcc=["dan@example.org"])
    for delivery in email.deliveries.all():
        run(delivery)
    assert headers(mailbox) == [("bob@example.org", "carl@example.org", None)] * 3
    assert [each.rcpt_tos[0][0] for each in mailbox.messages] == ["b", "c", "d"]


def test_recipients_see_each_other_only_with_show_recipients(accept, mailbox):
    both = ["bob@example.org", "eve@example.org"]
    for delivery in accept(recipients=both).deliveries.all():
        run(delivery)
    assert [to for to, _, _ in headers(mailbox)] == both
    run(accept(recipients=both, show_recipients=True).deliveries.first())
    assert headers(mailbox)[2][0] == ", ".join(both)


def test_attachments_and_dots_arrive_unchanged(accept, mailbox):
    text = "one\n.two\n..three\n.\nfour"
    content = bytes(range(256)) * 10
    run(
        accept(
            text=text,
            reply_to=["help@example.org"],
            attachments=[File("a.bin", "application/octet-stream", content)],
        ).deliveries.get()
    )
    message = message_from_bytes(mailbox.messages[0].content, policy=policy.default)
    assert message.get_body(("plain",)).get_content().splitlines() == text.splitlines()
    (attachment,) = message.iter_attachments()
    assert attachment.get_content() == content
    assert attachment.get_filename() == "a.bin"
    assert message["Reply-To"] == "help@example.org"


def test_email_that_cannot_become_a_message_fails_immediately(accept, mailbox):
    delivery = accept().deliveries.get()
    Email.objects.update(subject="two\nlines")
    assert run(delivery).state == State.FAILED
    assert mailbox.messages == []


# The deadline


def test_gives_up_at_the_deadline(delivery):
    Delivery.objects.update(expires_at=timezone.now() + timedelta(seconds=10))
    delivery = run(delivery)
    assert (delivery.state, delivery.failed_by) == (State.FAILED, "deadline")
    assert delivery.due_at is None


def test_outcome_without_the_lease_changes_nothing(delivery):
    late = claim(delivery)
    Delivery.objects.update(state=State.QUEUED)
    assert not end(late, State.FAILED, code=550, answer="", seconds=1)
    current = claim(delivery)
    assert not end(late, State.FAILED, code=550, answer="", seconds=1)
    delivery.refresh_from_db()
    assert delivery.state == State.SENDING
    assert not delivery.log.exists()
    assert not Counter.objects.filter(name="attempts.failed").exists()
    assert end(current, State.DEFERRED, code=451, answer="", seconds=1, wait=0)


def test_sent_is_recorded_even_without_the_lease(delivery):
    late = claim(delivery)
    Delivery.objects.update(state=State.QUEUED)
    current = claim(delivery)
    assert end(late, State.SENT, code=250, answer="", seconds=1)
    assert not end(current, State.DEFERRED, code=451, answer="", seconds=1)
    delivery.refresh_from_db()
    assert (delivery.state, delivery.log.get().number) == (State.SENT, 1)


def test_logs_name_the_email_but_no_address_and_no_body(delivery, mailbox, caplog):
    mailbox.recipient_reply = "550 bob@example.org is unknown"
    caplog.handler.addFilter(context.AddIds())
    with caplog.at_level(logging.DEBUG):
        run(delivery)
    (record,) = (record for record in caplog.records if record.name == "emails.delivering")
    ids = f"email={delivery.email_id} delivery={delivery.pk}"
    assert OneLineFormatter().format(record).endswith(f"code 550 {ids}")
    fields = json.loads(JsonFormatter().format(record))
    assert fields["message"] == "failed after attempt 1, SMTP code 550"
    assert (fields["email"], fields["delivery"]) == (str(delivery.email_id), str(delivery.pk))
    assert "bob" not in caplog.text
    assert "Body" not in caplog.text


def test_traceback_is_logged_in_one_line():
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    line = OneLineFormatter().format(record)
    assert "\n" not in line
    assert "second" in line
