import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from emails.models import AT_ONCE, Delivery, State
from emails.relay import Publisher
from emails.tasks import deliver
from mailroom.celery import app

pytestmark = pytest.mark.django_db


@pytest.fixture
def published(monkeypatch):
    """The delivery ids that would have gone to the broker."""
    ids = []
    monkeypatch.setattr(Publisher, "_connect", lambda self: None)
    monkeypatch.setattr(deliver, "apply_async", lambda args, **_: ids.extend(args))
    return ids


def expire_lease():
    Delivery.objects.update(due_at=timezone.now() - timedelta(seconds=1))


def test_publishes_the_row_id_and_nothing_else(delivery, monkeypatch):
    sent = []
    unconnected = app.connection_for_write()
    monkeypatch.setattr(unconnected, "connect", lambda: None)
    monkeypatch.setattr(app, "connection_for_write", lambda: unconnected)
    monkeypatch.setattr(
        app.amqp,
        "send_task_message",
        lambda _, name, message, **options: sent.append((name, message, options)),
    )
    Publisher().publish_due()
    ((name, message, options),) = sent
    assert name == "emails.tasks.deliver"
    assert message.body[:2] == ((delivery.pk,), {})
    assert "example.org" not in str(message)
    assert options["mandatory"] is True
    assert options["queue"].name == "mail.v1"
    assert options["retry"] is False
    assert options["confirm_timeout"] == 5


def test_publishes_what_is_due_once(accept, published):
    accept(recipients=["bob@example.org", "eve@example.org"])
    later, done = accept().deliveries.get(), accept().deliveries.get()
    Delivery.objects.filter(pk=later.pk).update(
        state=State.DEFERRED, due_at=timezone.now() + timedelta(minutes=1)
    )
    Delivery.objects.filter(pk=done.pk).update(state=State.SENT)
    relay = Publisher()
    assert relay.publish_due() == 2
    assert len(published) == 2
    assert {later.pk, done.pk}.isdisjoint(published)
    assert relay.publish_due() == 0


def test_an_expired_lease_makes_a_delivery_due_again(delivery, published):
    Publisher().publish_due()
    expire_lease()
    Publisher().publish_due()
    assert published == [delivery.pk, delivery.pk]


def test_a_delivery_whose_worker_died_is_queued_again(delivery, published):
    Publisher().publish_due()
    Delivery.objects.claim(delivery.pk)
    assert Publisher().publish_due() == 0
    expire_lease()
    Publisher().publish_due()
    Publisher().publish_due()
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts) == (State.QUEUED, 1)
    assert published == [delivery.pk, delivery.pk]


def test_a_broker_that_refuses_costs_no_row(delivery):
    with pytest.raises(CommandError, match="Connection refused"):
        call_command("relay", "--once")
    delivery.refresh_from_db()
    assert (delivery.state, delivery.due_at) == (State.QUEUED, AT_ONCE)


def test_release_leaves_a_claimed_delivery_alone(delivery):
    leased = Delivery.objects.lease(1)
    Delivery.objects.claim(delivery.pk)
    Delivery.objects.release(leased)
    delivery.refresh_from_db()
    assert delivery.state == State.SENDING
    assert delivery.due_at > timezone.now()


@pytest.fixture
def silent_broker():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_silent_broker_holds_the_relay_for_seconds_only(
    delivery, settings, silent_broker, monkeypatch
):
    port = silent_broker.getsockname()[1]
    monkeypatch.setattr(app.conf, "broker_url", f"amqp://127.0.0.1:{port}//")
    started = time.monotonic()
    with pytest.raises(CommandError, match="not published"):
        call_command("relay", "--once")
    assert time.monotonic() - started < 12
    delivery.refresh_from_db()
    assert delivery.due_at == AT_ONCE


@pytest.mark.parametrize("broker", ["silent", "refusing"])
def test_sigterm_ends_the_relay_within_two_seconds(tmp_path, settings, silent_broker, broker):
    port = silent_broker.getsockname()[1] if broker == "silent" else 1
    env = os.environ | {
        "DJANGO_SETTINGS_MODULE": "mailroom.settings",
        "DATABASE_URL": f"sqlite:///{tmp_path / 'db.sqlite3'}",
        "BROKER_URL": f"amqp://127.0.0.1:{port}//",
    }
    manage = [sys.executable, settings.BASE_DIR / "manage.py"]
    subprocess.run([*manage, "migrate", "-v0"], env=env, check=True)
    accept = (
        "from django.contrib.auth.models import User; from emails import services;"
        "services.accept(User.objects.create(username='a'), subject='s', text='t',"
        " recipients=['bob@example.org'])"
    )
    subprocess.run([*manage, "shell", "-v0", "-c", accept], env=env, check=True)
    relay = subprocess.Popen([*manage, "relay"], env=env, stderr=subprocess.PIPE, text=True)
    if broker == "silent":
        connection, _ = silent_broker.accept()
        connection.recv(8)  # the protocol header: the relay now waits for an answer
    else:
        assert "doesn't answer" in relay.stderr.readline()
    started = time.monotonic()
    relay.send_signal(signal.SIGTERM)
    assert relay.wait(timeout=10) == 0
    assert time.monotonic() - started < 2
