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

from emails.models import Delivery, State
from emails.relay import Relay
from emails.tasks import deliver
from mailroom.celery import app

pytestmark = pytest.mark.django_db


@pytest.fixture
def published(monkeypatch):
    """The delivery ids that would have gone to the broker."""
    ids = []
    monkeypatch.setattr(deliver, "apply_async", lambda args, **_: ids.extend(args))
    return ids


def expire_lease():
    Delivery.objects.update(lease_until=timezone.now() - timedelta(seconds=1))


def test_publishes_the_row_id_and_nothing_else(delivery, monkeypatch):
    sent = []
    monkeypatch.setattr(
        app.amqp,
        "send_task_message",
        lambda _, name, message, **options: sent.append((name, message, options)),
    )
    Relay().run_once()
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
        state=State.DEFERRED, next_attempt_at=timezone.now() + timedelta(minutes=1)
    )
    Delivery.objects.filter(pk=done.pk).update(state=State.SENT)
    relay = Relay()
    assert relay.run_once() == 2
    assert len(published) == 2
    assert {later.pk, done.pk}.isdisjoint(published)
    assert relay.run_once() == 0


def test_an_expired_lease_makes_a_delivery_due_again(delivery, published):
    Relay().run_once()
    expire_lease()
    Relay().run_once()
    assert published == [delivery.pk, delivery.pk]


def test_a_delivery_whose_worker_died_is_queued_again(delivery, published):
    Relay().run_once()
    Delivery.objects.claim(delivery.pk)
    assert Relay().run_once() == 0
    expire_lease()
    Relay().run_once()
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts) == (State.QUEUED, 1)
    assert published == [delivery.pk, delivery.pk]


def test_of_two_relays_one_publishes(delivery, published, monkeypatch):
    """The second looks at the table before the first has leased anything."""
    first, second = Relay(), Relay()
    lease = Delivery.objects.lease

    def late_lease(queryset, pk):
        monkeypatch.undo()
        monkeypatch.setattr(deliver, "apply_async", lambda args, **_: published.extend(args))
        first.run_once()
        return lease(pk)

    monkeypatch.setattr(type(Delivery.objects.all()), "lease", late_lease)
    monkeypatch.setattr(type(Delivery.objects), "lease", late_lease)
    second.run_once()
    assert published == [delivery.pk]


def test_a_broker_that_refuses_costs_no_row(delivery):
    with pytest.raises(CommandError, match="Connection refused"):
        call_command("relay", "--once")
    delivery.refresh_from_db()
    assert (delivery.state, delivery.lease_until) == (State.QUEUED, None)


def test_release_leaves_a_claimed_delivery_alone(delivery):
    until = Delivery.objects.lease(delivery.pk)
    Delivery.objects.claim(delivery.pk)
    Delivery.objects.release(delivery.pk, until)
    delivery.refresh_from_db()
    assert delivery.state == State.SENDING
    assert delivery.lease_until is not None


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
    assert delivery.lease_until is None


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
