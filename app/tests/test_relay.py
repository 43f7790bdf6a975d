import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import Mock

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection, transaction
from django.utils import timezone

from emails import relay as relay_module
from emails import services
from emails.models import AT_ONCE, ApiKey, Delivery, State, sending_lease
from emails.relay import Publisher, Relay
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
    sent, asked = [], []
    unconnected = app.connection_for_write()
    monkeypatch.setattr(unconnected, "connect", lambda: None)
    monkeypatch.setattr(
        app, "connection_for_write", lambda **options: asked.append(options) or unconnected
    )
    monkeypatch.setattr(
        app.amqp,
        "send_task_message",
        lambda _, name, message, **options: sent.append((name, message, options)),
    )
    Publisher().publish_due()
    ((name, message, options),) = sent
    assert name == "emails.tasks.deliver"
    assert message.body[:2] == ([delivery.pk], {})
    assert "example.org" not in str(message)
    assert options["mandatory"] is True
    assert options["queue"].name == "mail.v1"
    assert options["retry"] is False
    assert options["confirm_timeout"] == 5
    assert {"transport_options": {"confirm_publish": True}} in asked


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


def test_a_backlog_is_published_several_a_message(accept, published, monkeypatch):
    for _ in range(relay_module.BATCH + 3):
        accept()
    messages = []
    monkeypatch.setattr(deliver, "apply_async", lambda args, **_: messages.append(args))
    relay = Publisher()
    assert relay.publish_due() == relay_module.BATCH
    assert {len(message) for message in messages} == {relay_module.TOGETHER}
    messages.clear()
    assert relay.publish_due() == 3
    assert [len(message) for message in messages] == [1, 1, 1]
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


def test_a_publication_that_failed_costs_its_connection_and_no_time(accept, monkeypatch):
    """A late answer to it would be taken for the next one's."""
    first, second, third = (accept().deliveries.get() for _ in range(3))
    broken = app.connection_for_write()
    monkeypatch.setattr(broken, "collect", Mock())
    monkeypatch.setattr(Publisher, "_connect", lambda self: setattr(self, "_connection", broken))
    monkeypatch.setattr(deliver, "apply_async", Mock(side_effect=[None, TimeoutError]))
    publisher = Publisher()
    with pytest.raises(TimeoutError):
        publisher.publish_due()
    assert publisher._connection is None
    broken.collect.assert_called_once()
    assert list(Delivery.objects.due()) == [second, third]
    first.refresh_from_db()
    assert first.due_at > timezone.now() + timedelta(minutes=9)


def test_release_leaves_a_claimed_delivery_alone(delivery):
    leased = Delivery.objects.lease(1)
    Delivery.objects.claim(delivery.pk)
    Delivery.objects.release(leased)
    delivery.refresh_from_db()
    assert delivery.state == State.SENDING
    assert delivery.due_at > timezone.now()


def test_a_worker_lost_after_the_data_makes_it_uncertain(delivery, settings):
    for policy, due in (("resend", True), ("hold", False)):
        settings.UNCERTAIN_POLICY = policy
        Delivery.objects.update(state=State.QUEUED)
        Delivery.objects.claim(delivery.pk).mark_data()
        expire_lease()
        assert Delivery.objects.lease(1) == []
        delivery.refresh_from_db()
        assert (delivery.state, delivery.due_at is not None) == (State.UNCERTAIN, due)
    assert delivery.uncertain_attempts == 2
    assert [attempt.outcome for attempt in delivery.log.all()] == [State.UNCERTAIN] * 2


def test_a_worker_lost_before_the_data_of_its_own_attempt_is_certain(delivery):
    """Whatever the attempt before had sent."""
    Delivery.objects.claim(delivery.pk).mark_data()
    Delivery.objects.update(state=State.QUEUED)
    assert not Delivery.objects.claim(delivery.pk).data_sent
    expire_lease()
    assert Delivery.objects.lease(1) == []
    delivery.refresh_from_db()
    assert (delivery.state, delivery.uncertain_attempts) == (State.DEFERRED, 0)


def test_a_claim_is_a_lease(delivery):
    before = timezone.now()
    claimed = Delivery.objects.claim(delivery.pk)
    delivery.refresh_from_db()
    assert before <= claimed.due_at - sending_lease() <= timezone.now()
    assert claimed.due_at == delivery.due_at


def test_a_claim_knows_whether_there_are_attachments(accept):
    plain, full = accept(), accept(attachments=[services.File("a", "text/plain", b"a")])
    for email, attached in ((plain, False), (full, True)):
        assert Delivery.objects.claim(email.deliveries.get().pk).has_attachments is attached


@pytest.mark.skipif(connection.vendor == "sqlite", reason="it has no such setting")
@pytest.mark.django_db(transaction=True)
def test_only_a_claim_need_not_be_on_disk_at_once(accept, delivery):
    def on_disk_at_once() -> str:
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            return cursor.fetchone()[0]

    with transaction.atomic():
        accept()  # the relay is told after the commit
        assert on_disk_at_once() == "on"
    assert on_disk_at_once() == "on"
    with transaction.atomic():
        claimed = Delivery.objects.claim(delivery.pk)
        assert on_disk_at_once() == "off"
    with transaction.atomic():
        claimed.mark_data()
        assert on_disk_at_once() == "on"
        claimed.record(State.SENT, code=250, answer="", seconds=1)
        assert on_disk_at_once() == "on"


@pytest.mark.skipif(connection.vendor == "sqlite", reason="it prepares nothing")
@pytest.mark.django_db(transaction=True)
def test_the_server_keeps_the_statements_of_every_email_and_no_others(accept, monkeypatch):
    connection.close()
    for _ in range(7):
        monkeypatch.setattr(services, "_woken_at", float("-inf"))
        ApiKey.authenticate("no such key")
        delivery = accept().deliveries.get()
        Delivery.objects.lease(1)
        claimed = Delivery.objects.claim(delivery.pk)
        claimed.mark_data()
        claimed.record(State.SENT, code=250, answer="", seconds=1)
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement FROM pg_prepared_statements")
        kept = {" ".join(re.findall(r"\w+", statement)[:3]) for (statement,) in cursor}
    assert kept == {
        "SELECT k id",
        "WITH stored AS",
        "SELECT set_config synchronous_commit",
        "UPDATE emails_delivery AS",
        "UPDATE emails_delivery SET",
        "WITH ended AS",
    }


@pytest.mark.skipif(connection.vendor == "sqlite", reason="it prepares nothing")
@pytest.mark.django_db(transaction=True)
def test_a_migration_that_changes_a_column_leaves_no_process_with_an_old_plan(accept):
    other = connection.copy()  # psycopg forgets its plans after an ALTER of its own

    def change(column, kind):
        with other.cursor() as cursor:
            cursor.execute(f"ALTER TABLE emails_email ALTER {column} TYPE {kind}")

    def claim():
        return Delivery.objects.claim(accept().deliveries.get().pk)

    assert all(claim() for _ in range(7))
    change("request_id", "varchar(65)")
    try:
        assert claim()
    finally:
        change("request_id", "varchar(64)")
        other.close()


def test_what_is_past_its_deadline_is_not_published(accept, published):
    for state in (State.QUEUED, State.UNCERTAIN):
        accept(deadline=timezone.now() + timedelta(hours=1)).deliveries.update(state=state)
    old, fine = accept(), accept()
    Delivery.objects.exclude(email__in=[old, fine]).update(expires_at=timezone.now())
    type(old).objects.filter(pk=old.pk).update(created_at=timezone.now() - timedelta(days=2))
    Publisher().publish_due()
    assert published == [fine.deliveries.get().pk]
    states = Delivery.objects.exclude(email=fine).order_by("pk").values_list("state", "due_at")
    assert list(states) == [(State.FAILED, None), (State.UNCERTAIN, None), (State.FAILED, None)]


def test_a_relay_that_dies_costs_half_a_minute(delivery, published):
    """What it took is leased for long only once the broker has it."""
    Delivery.objects.lease(1)
    delivery.refresh_from_db()
    assert delivery.due_at <= timezone.now() + timedelta(seconds=30)
    expire_lease()
    Publisher().publish_due()
    delivery.refresh_from_db()
    assert delivery.due_at > timezone.now() + timedelta(minutes=9)


def test_a_clock_that_was_set_back_makes_nothing_wait(accept):
    def deliveries(minutes: float) -> list[int]:
        due_at = timezone.now() + timedelta(minutes=minutes)
        waits = ((State.QUEUED, 0), (State.SENDING, 1), (State.DEFERRED, 1), (State.DEFERRED, 9))
        for state, attempts in (*waits, (State.SENT, 1)):
            accept().deliveries.update(state=state, attempts=attempts, due_at=due_at)
        return [pk for pk in Delivery.objects.order_by("pk").values_list("pk", flat=True)][-5:]

    # A lease of the queue is ten minutes, a worker's 150 s, a first retry 30 s, a ninth an hour.
    queued, sending, first, ninth, _ = deliveries(minutes=9)
    assert Delivery.objects.mistrust_clock() == 2
    assert {delivery.pk for delivery in Delivery.objects.due()} == {sending, first}
    Delivery.objects.all().delete()
    *waiting, _ = deliveries(minutes=70)
    assert Delivery.objects.mistrust_clock() == 4
    assert {delivery.pk for delivery in Delivery.objects.due()} == set(waiting)


def test_what_was_just_accepted_is_due_whatever_the_clock_says(delivery, monkeypatch):
    earlier = timezone.now() - timedelta(days=400)
    monkeypatch.setattr("django.utils.timezone.now", lambda: earlier)
    assert Delivery.objects.due().exists()


@pytest.mark.skipif(connection.vendor == "sqlite", reason="one transaction writes at a time there")
@pytest.mark.django_db(transaction=True)
def test_relays_do_not_wait_for_each_other(accept):
    """Nor does one hold back the other recipients of an email."""
    first, second = accept(recipients=["bob@example.org", "eve@example.org"]).deliveries.all()

    def lease():
        try:
            return Delivery.objects.lease(9)
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool, transaction.atomic():
        assert Delivery.objects.lease(1) == [first]
        assert pool.submit(lease).result(timeout=5) == [second]


@contextmanager
def running(relay: Relay):
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield
        assert thread.is_alive()
    finally:
        relay.stop()
        thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite tells nobody")
@pytest.mark.django_db(transaction=True)
def test_an_email_wakes_the_relay(accept, published, settings, monkeypatch):
    # By nothing else would it look at the table again within ten seconds.
    settings.RELAY_POLL_SECONDS = 60.0
    settings.RELAY_THREADS = 1
    monkeypatch.setattr(relay_module, "LONGEST_PAUSE", 60)
    first = accept().deliveries.get()
    relay = Relay()
    with running(relay):
        eventually(lambda: relay._listening is not None)
        eventually(lambda: published == [first.pk])
        second = accept().deliveries.get()
        eventually(lambda: published == [first.pk, second.pk], seconds=5)
        Delivery.objects.update(state=State.FAILED, due_at=None)
        assert services.replay(Delivery.objects.filter(pk=first.pk)) == 1
        eventually(lambda: published == [first.pk, second.pk, first.pk], seconds=5)


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite tells nobody")
@pytest.mark.django_db(transaction=True)
def test_one_word_stands_for_many_emails_and_none_is_overlooked(
    accept, published, settings, monkeypatch
):
    settings.RELAY_POLL_SECONDS = 60.0
    settings.RELAY_THREADS = 1
    monkeypatch.setattr(relay_module, "LONGEST_PAUSE", 60)
    words, notify = [], services.postgresql.notify
    monkeypatch.setattr(
        services.postgresql, "notify", lambda channel: words.append(1) or notify(channel)
    )
    relay = Relay()
    with running(relay):
        eventually(lambda: relay._listening is not None)
        accepted = set()
        for length in (*range(1, 20), *range(1, 20)):
            for _ in range(length):
                accepted.add(accept().pk)
            # Where a burst ends there is no further word that would help.
            eventually(lambda: len(published) == len(accepted), seconds=5)
    assert len(words) < len(accepted) / 2


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite tells nobody")
@pytest.mark.django_db(transaction=True)
def test_a_word_that_comes_while_the_relay_settles_is_for_the_next_look(settings, monkeypatch):
    settings.RELAY_POLL_SECONDS = 60.0
    relay = Relay()

    def tell():
        services.postgresql.notify(services.CHANNEL)
        connection.close()

    def tell_meanwhile(seconds):
        thread = threading.Thread(target=tell)
        thread.start()
        thread.join()

    monkeypatch.setattr(relay._stopping, "wait", tell_meanwhile)
    threading.Timer(0.5, tell).start()
    began = time.monotonic()
    relay._wait()
    relay._wait()
    assert time.monotonic() - began < 5  # not the ten seconds of a wait without a word


@pytest.mark.skipif(connection.vendor == "sqlite", reason="it has no connection to lose")
@pytest.mark.django_db(transaction=True)
def test_a_relay_outlives_its_connections_to_the_database(accept, published, settings):
    relay = Relay()
    with running(relay):
        eventually(lambda: relay._listening is not None)
        lost = relay._listening
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        delivery = accept().deliveries.get()
        eventually(lambda: published == [delivery.pk])
        eventually(lambda: relay._listening is not lost)


@pytest.mark.parametrize("error", [OperationalError("away"), ConnectionRefusedError("away")])
def test_a_publisher_outlives_what_it_meets(monkeypatch, error):
    monkeypatch.setattr(relay_module, "LONGEST_PAUSE", 0.1)
    # The test's own has to stay.
    monkeypatch.setattr(relay_module, "close_old_connections", lambda: None)
    monkeypatch.setattr(relay_module, "connection", Mock())
    relay, met = Relay(), []

    def publish_due(self):
        met.append(error)
        if len(met) == 1:
            raise error
        relay.stop()
        return 0

    monkeypatch.setattr(Publisher, "publish_due", publish_due)
    relay._publish(relay._publishers[0])
    assert len(met) == 2


def eventually(check, seconds=10):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


def test_a_publisher_that_is_stuck_stops_the_watchdogs_food(monkeypatch):
    monkeypatch.setattr(relay_module, "STUCK_SECONDS", 0.5)
    told = []
    monkeypatch.setattr(relay_module.systemd, "notify", told.append)
    relay = Relay()
    monkeypatch.setattr(relay, "_wait", lambda: time.sleep(0.1))
    monkeypatch.setattr(Delivery.objects, "mistrust_clock", lambda: 0)

    def publish(publisher):
        while not relay._stopping.wait(0.1):
            if publisher is not relay._publishers[0]:
                publisher.seen_alive = time.monotonic()

    monkeypatch.setattr(relay, "_publish", publish)
    with running(relay):
        eventually(lambda: "WATCHDOG=1" in told)
        time.sleep(0.7)
        told.clear()
        time.sleep(0.5)
        assert told == []


@pytest.mark.parametrize("broker", ["silent", "refusing"])
def test_sigterm_ends_a_relay_that_waits_for_its_broker(tmp_path, settings, silent_broker, broker):
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
    # As under systemd.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        relay = subprocess.Popen([*manage, "relay"], env=env, stderr=subprocess.PIPE, text=True)
        assert systemd.recv(99) == b"READY=1"
        assert systemd.recv(99) == b"WATCHDOG=1"
    if broker == "silent":
        connection, _ = silent_broker.accept()
        connection.recv(8)  # the protocol header: the relay now waits for an answer
    else:
        assert "doesn't answer" in relay.stderr.readline()
    relay.send_signal(signal.SIGTERM)
    # Half of what systemd gives it before it kills it; by itself it takes a second.
    assert relay.wait(timeout=15) == 0
