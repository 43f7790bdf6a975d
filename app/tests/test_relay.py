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
from django.db.models import F
from django.utils import timezone

from emails import api_keys, deliveries, services
from emails import relay as relay_module
from emails.deliveries import sending_lease
from emails.models import Counter, Delivery
from emails.publisher import BATCH, DELIVERIES_PER_MESSAGE, Publisher
from emails.relay import Relay
from emails.states import State
from emails.tasks import deliver
from emails.validation import File
from mailroom.celery import app
from tests.harness import eventually
from tests.tools import begin, claim, database_url, due, end

pytestmark = pytest.mark.django_db


@pytest.fixture
def published(monkeypatch):
    """The ids of deliveries that would have been published."""
    ids = []
    monkeypatch.setattr(Publisher, "_connect", lambda self: None)
    monkeypatch.setattr(deliver, "apply_async", lambda args, **_: ids.extend(args))
    return ids


def expire_lease():
    Delivery.objects.update(due_at=timezone.now() - timedelta(seconds=1))


def test_message_contains_only_the_row_id(delivery, monkeypatch):
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
    (options,) = (each["transport_options"] for each in asked if each)
    assert (options["confirm_publish"], options["read_timeout"]) == (True, 5)


def test_publishes_due_deliveries_once(accept, published):
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


def test_backlog_is_published_with_several_ids_per_message(accept, published, monkeypatch):
    for _ in range(BATCH + 3):
        accept()
    messages = []
    monkeypatch.setattr(deliver, "apply_async", lambda args, **_: messages.append(args))
    relay = Publisher()
    assert relay.publish_due() == BATCH
    assert {len(message) for message in messages} == {DELIVERIES_PER_MESSAGE}
    messages.clear()
    assert relay.publish_due() == 3
    assert [len(message) for message in messages] == [1, 1, 1]
    assert relay.publish_due() == 0


def test_expired_lease_makes_a_delivery_due_again(delivery, published):
    Publisher().publish_due()
    expire_lease()
    Publisher().publish_due()
    assert published == [delivery.pk, delivery.pk]


def test_delivery_of_a_dead_worker_is_queued_again(delivery, published):
    Publisher().publish_due()
    claim(delivery)
    assert Publisher().publish_due() == 0
    expire_lease()
    Publisher().publish_due()
    Publisher().publish_due()
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts) == (State.QUEUED, 1)
    assert published == [delivery.pk, delivery.pk]


def test_broker_error_loses_no_row(delivery):
    with pytest.raises(CommandError, match="Connection refused"):
        call_command("relay", "--once")
    delivery.refresh_from_db()
    assert due().get() == delivery


def test_failed_publication_discards_its_connection_and_releases_the_lease(accept, monkeypatch):
    """On an open connection, a late confirm would be mistaken for that of the next publication."""
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
    assert list(due()) == [second, third]
    first.refresh_from_db()
    assert first.due_at > timezone.now() + timedelta(minutes=9)


def test_release_does_not_change_a_claimed_delivery(delivery):
    leased = deliveries.lease(1)
    claim(delivery)
    deliveries.release(leased)
    delivery.refresh_from_db()
    assert delivery.state == State.SENDING
    assert delivery.due_at > timezone.now()


def test_worker_lost_after_the_data_makes_the_delivery_uncertain(delivery, settings):
    for policy, retried in (("resend", True), ("hold", False)):
        settings.EMAILS_UNCERTAIN_POLICY = policy
        Delivery.objects.update(state=State.QUEUED)
        begin(claim(delivery))
        expire_lease()
        assert deliveries.lease(1).deliveries == []
        delivery.refresh_from_db()
        assert (delivery.state, delivery.due_at is not None) == (State.UNCERTAIN, retried)
    assert delivery.uncertain_attempts == 2
    assert [attempt.outcome for attempt in delivery.log.all()] == [State.UNCERTAIN] * 2


def test_lease_ends_deliveries_with_whole_and_fractional_waits(accept):
    """One worker died before the data, and another after the data. The waits differ."""
    before, after = (accept().deliveries.get() for _ in range(2))
    claim(before)
    begin(claim(after))
    expire_lease()
    assert deliveries.lease(2).deliveries == []
    states = set(Delivery.objects.values_list("state", flat=True))
    assert states == {State.DEFERRED, State.UNCERTAIN}


def test_worker_lost_before_the_data_defers_the_delivery(delivery):
    """The delivery is deferred even if the previous attempt had sent data."""
    begin(claim(delivery))
    Delivery.objects.update(state=State.QUEUED)
    claim(delivery)
    delivery.refresh_from_db()
    assert not delivery.data_sent
    expire_lease()
    assert deliveries.lease(1).deliveries == []
    delivery.refresh_from_db()
    assert (delivery.state, delivery.uncertain_attempts) == (State.DEFERRED, 0)


def test_claim_is_a_lease(delivery):
    before = timezone.now()
    claimed = claim(delivery)
    delivery.refresh_from_db()
    assert before <= delivery.due_at - sending_lease() <= timezone.now()
    assert claimed.id == delivery.pk


def test_claim_includes_whether_there_are_attachments(accept):
    plain, full = accept(), accept(attachments=[File("a", "text/plain", b"a")])
    for email, attached in ((plain, False), (full, True)):
        assert claim(email.deliveries.get()).has_attachments is attached


@pytest.mark.django_db(transaction=True)
def test_claim_commits_asynchronously_but_accept_and_record_do_not(accept, delivery):
    def on_disk_at_once() -> str:
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            return cursor.fetchone()[0]

    with transaction.atomic():
        accept()  # notifies the relay after the commit
        assert on_disk_at_once() == "on"
    assert on_disk_at_once() == "on"
    with transaction.atomic():
        claimed = claim(delivery)
        assert on_disk_at_once() == "off"
    with transaction.atomic():
        begin(claimed)
        assert on_disk_at_once() == "on"
        end(claimed, State.SENT, code=250, answer="", seconds=1)
        assert on_disk_at_once() == "on"


@pytest.mark.django_db(transaction=True)
def test_only_statements_per_email_are_prepared(accept, monkeypatch):
    def name(statement: str) -> str:
        return " ".join(re.findall(r"\w+", re.sub("--.*", "", statement))[:3])

    connection.close()
    for _ in range(7):
        monkeypatch.setattr(services, "_notified_at", float("-inf"))
        api_keys.authenticate("no such key")
        delivery = accept().deliveries.get()
        deliveries.lease(1)
        claimed = claim(delivery)
        begin(claimed)
        end(claimed, State.SENT, code=250, answer="", seconds=1)
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement FROM pg_prepared_statements")
        kept = {name(statement) for (statement,) in cursor}
    assert kept == {
        "SELECT k id",
        "WITH suppressed AS",
        "SELECT set_config synchronous_commit",
        "WITH queued AS",
        "WITH outcome AS",
    }


@pytest.mark.django_db(transaction=True)
def test_processes_survive_a_migration_that_changes_a_column(accept):
    other = connection.copy()  # psycopg drops its plans after an ALTER on the same connection

    def change(column, kind):
        with other.cursor() as cursor:
            cursor.execute(f"ALTER TABLE emails_email ALTER {column} TYPE {kind}")

    def claims():
        return claim(accept().deliveries.get())

    assert all(claims() for _ in range(7))
    change("request_id", "varchar(65)")
    try:
        assert claims()
    finally:
        change("request_id", "varchar(64)")
        other.close()


def test_expired_delivery_is_not_published(accept, published):
    for state in (State.QUEUED, State.UNCERTAIN):
        accept(deadline=timezone.now() + timedelta(hours=1)).deliveries.update(state=state)
    fine = accept()
    Delivery.objects.exclude(email=fine).update(expires_at=timezone.now())
    Publisher().publish_due()
    assert published == [fine.deliveries.get().pk]
    states = (
        Delivery.objects.exclude(email=fine)
        .order_by("pk")
        .values_list("state", "due_at", "failed_by")
    )
    assert list(states) == [(State.FAILED, None, "deadline"), (State.UNCERTAIN, None, "")]


def test_leases_of_a_dead_relay_are_recovered_after_half_a_minute(delivery, published):
    """The deliveries are published again only if the queue is empty."""
    deliveries.lease(1)
    assert not deliveries.is_waiting_for_worker()
    assert deliveries.requeue_lost(queue_is_empty=True) == 0
    later = timedelta(seconds=31)
    Delivery.objects.update(due_at=F("due_at") - later, published_at=F("published_at") - later)
    assert deliveries.is_waiting_for_worker()
    assert deliveries.requeue_lost(queue_is_empty=False) == 0
    assert deliveries.requeue_lost(queue_is_empty=True) == 1
    Publisher().publish_due()
    assert published == [delivery.pk]
    assert Counter.objects.get(name="republished").total == 1


def test_publication_is_lost_if_a_later_one_arrived(accept):
    """The delivery is published again even if messages wait in the queue."""
    lost, waiting, sent = (accept().deliveries.get() for _ in range(3))
    deliveries.lease(3)
    end(claim(sent), State.SENT, code=250)
    assert deliveries.requeue_lost(queue_is_empty=False) == 0
    later = timedelta(seconds=61)
    Delivery.objects.filter(pk=lost.pk).update(
        due_at=F("due_at") - later, published_at=F("published_at") - later
    )
    assert deliveries.requeue_lost(queue_is_empty=False) == 1
    assert due().get() == lost


def test_clock_that_was_set_back_delays_nothing(accept):
    def stored(minutes: float) -> list[int]:
        due_at = timezone.now() + timedelta(minutes=minutes)
        waits = ((State.QUEUED, 0), (State.SENDING, 1), (State.DEFERRED, 1), (State.DEFERRED, 9))
        for state, attempts in (*waits, (State.SENT, 1)):
            accept().deliveries.update(
                state=state, attempts=attempts, due_at=due_at, published_at=timezone.now()
            )
        return [pk for pk in Delivery.objects.order_by("pk").values_list("pk", flat=True)][-5:]

    # Leases are ten minutes in the queue and 150 s in a worker. A first retry waits 30 s, a ninth
    # retry an hour.
    queued, sending, first, ninth, _ = stored(minutes=9)
    assert deliveries.reset_impossible_due_times() == 2
    assert {delivery.pk for delivery in due()} == {sending, first}
    Delivery.objects.all().delete()
    *waiting, _ = stored(minutes=70)
    assert deliveries.reset_impossible_due_times() == 4
    assert {delivery.pk for delivery in due()} == set(waiting)


def test_due_times_use_the_databases_clock(delivery, monkeypatch):
    """A wrong clock on a host has no effect."""
    for days in (-400, 400):
        wrong = timezone.now() + timedelta(days=days)
        monkeypatch.setattr("django.utils.timezone.now", lambda wrong=wrong: wrong)
        assert deliveries.lease(1).deliveries[0].id == delivery.pk
        deliveries.requeue([delivery.pk])


@pytest.mark.django_db(transaction=True)
def test_relays_do_not_wait_for_each_other(accept):
    """Relays that lease at the same time don't delay other recipients of an email either."""
    first, second = accept(recipients=["bob@example.org", "eve@example.org"]).deliveries.all()

    def lease():
        try:
            return [each.id for each in deliveries.lease(9).deliveries]
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool, transaction.atomic():
        assert [each.id for each in deliveries.lease(1).deliveries] == [first.pk]
        assert pool.submit(lease).result(timeout=5) == [second.pk]


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


@pytest.mark.django_db(transaction=True)
def test_email_wakes_the_relay(accept, published, settings, monkeypatch):
    # Without a notification, the relay would not query again within ten seconds.
    settings.EMAILS_RELAY_POLL_SECONDS = 60.0
    settings.EMAILS_RELAY_THREADS = 1
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


@pytest.mark.django_db(transaction=True)
def test_one_notification_covers_many_emails_and_none_is_missed(
    accept, published, settings, monkeypatch
):
    settings.EMAILS_RELAY_POLL_SECONDS = 60.0
    settings.EMAILS_RELAY_THREADS = 1
    monkeypatch.setattr(relay_module, "LONGEST_PAUSE", 60)
    notifications, execute = [], services.execute
    monkeypatch.setattr(services, "execute", lambda *a: notifications.append(1) or execute(*a))
    relay = Relay()
    with running(relay):
        eventually(lambda: relay._listening is not None)
        accepted = set()
        for length in (*range(1, 20), *range(1, 20)):
            for _ in range(length):
                accepted.add(accept().pk)
            # After the last email in a burst, no further notification arrives.
            eventually(lambda: len(published) == len(accepted), seconds=5)
    assert len(notifications) < len(accepted) / 2


@pytest.mark.django_db(transaction=True)
def test_notification_during_the_settle_time_causes_another_query(settings, monkeypatch):
    settings.EMAILS_RELAY_POLL_SECONDS = 60.0
    relay = Relay()

    def tell():
        services._notified_at = float("-inf")
        services.notify_relay()
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
    assert time.monotonic() - began < 5  # without a notification: ten seconds


@pytest.mark.django_db(transaction=True)
def test_relay_survives_the_loss_of_its_database_connections(accept, published, settings):
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
def test_publisher_survives_errors(monkeypatch, error):
    monkeypatch.setattr(relay_module, "LONGEST_PAUSE", 0.1)
    # The test's connection must stay open.
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


@pytest.fixture
def silent_broker():
    """A port that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_silent_broker_blocks_the_relay_for_seconds_only(
    delivery, settings, silent_broker, monkeypatch
):
    port = silent_broker.getsockname()[1]
    monkeypatch.setattr(app.conf, "broker_url", f"amqp://127.0.0.1:{port}//")
    started = time.monotonic()
    with pytest.raises(CommandError, match="not published"):
        call_command("relay", "--once")
    assert time.monotonic() - started < 12
    assert due().get() == delivery


def test_stuck_publisher_stops_watchdog_pings(monkeypatch):
    monkeypatch.setattr(relay_module, "STUCK_SECONDS", 0.5)
    told = []
    monkeypatch.setattr(relay_module.systemd, "notify", told.append)
    relay = Relay()
    monkeypatch.setattr(relay, "_wait", lambda: time.sleep(0.1))
    monkeypatch.setattr(relay, "_repair", lambda: None)

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


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("broker", ["silent", "refusing"])
def test_sigterm_stops_a_relay_that_waits_for_its_broker(
    accept, tmp_path, settings, silent_broker, broker
):
    port = silent_broker.getsockname()[1] if broker == "silent" else 1
    env = os.environ | {
        "DJANGO_SETTINGS_MODULE": "mailroom.settings",
        "DATABASE_URL": database_url(),
        "BROKER_URL": f"amqp://127.0.0.1:{port}//",
    }
    manage = [sys.executable, settings.BASE_DIR / "manage.py"]
    accept()
    # The relay runs as under systemd.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        relay = subprocess.Popen([*manage, "relay"], env=env, stderr=subprocess.PIPE, text=True)
        assert systemd.recv(99) == b"READY=1"
        assert systemd.recv(99) == b"WATCHDOG=1"
    if broker == "silent":
        connection, _ = silent_broker.accept()
        connection.recv(8)  # the protocol header: the relay now waits for a response
    else:
        assert "is unavailable" in relay.stderr.readline()
    relay.send_signal(signal.SIGTERM)
    # Half of systemd's stop timeout. The relay stops within a second.
    assert relay.wait(timeout=15) == 0
