"""Tests EMAILS_SMTP_CONNECTIONS: the maximum number of connections of all threads and processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.conf import settings as django_settings
from django.db import connection

from emails import slots, smtp
from emails.models import Delivery
from emails.slots import smtp_slot
from emails.states import State
from emails.tasks import deliver
from tests.harness import eventually
from tests.tools import database_url, due

pytestmark = pytest.mark.django_db(transaction=True)

HOLD = """
import django; django.setup()
from emails.slots import smtp_slot
with smtp_slot(5) as taken:
    print(taken, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def close():
    yield
    if hasattr(slots._own, "database"):
        slots._own.database.close()
        del slots._own.database


def in_thread(act):
    try:
        return act()
    finally:
        smtp.close()
        if hasattr(slots._own, "database"):
            slots._own.database.close()
        connection.close()


def test_maximum_is_never_exceeded(settings):
    settings.EMAILS_SMTP_CONNECTIONS = 2
    lock, now, most = threading.Lock(), 0, 0

    def hold() -> bool:
        nonlocal now, most
        with smtp_slot(patience=20) as taken:
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.05)
            with lock:
                now -= 1
        return taken

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda _: in_thread(hold), range(18)))
    assert most == 2


def test_slot_ends_with_the_smtp_connection(accept, mailbox, settings):
    settings.EMAILS_SMTP_CONNECTIONS = 1
    for _ in range(2):
        deliver(accept().deliveries.get().pk)
    assert mailbox.connections == 2


def test_without_a_free_slot_the_deliveries_are_requeued(accept, mailbox, settings):
    settings.EMAILS_SMTP_CONNECTIONS = 1
    settings.EMAILS_SENDING_LEASE_SECONDS = 1  # a worker waits for a fifth of it
    delivery = accept().deliveries.get()
    Delivery.objects.update(due_at="2099-01-01T00:00Z")
    with smtp_slot(patience=1) as taken, ThreadPoolExecutor(1) as pool:
        assert taken
        pool.submit(in_thread, lambda: deliver(delivery.pk)).result(timeout=10)
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts, mailbox.messages) == (State.QUEUED, 0, [])
    assert due().get() == delivery


def test_killed_worker_frees_its_slot_immediately(settings):
    settings.EMAILS_SMTP_CONNECTIONS = 1
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=django_settings.BASE_DIR,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "mailroom.settings",
            "SECRET_KEY": "only-for-tests",
            "DATABASE_URL": database_url(),
            "SMTP_CONNECTIONS": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "True\n"
        with smtp_slot(patience=0.1) as taken:
            assert not taken
        holder.send_signal(signal.SIGKILL)
        began = time.monotonic()

        def free() -> bool:
            with smtp_slot(patience=0.1) as taken:
                return taken

        eventually(free, seconds=5)
        assert time.monotonic() - began < 3
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
