"""EMAILS_SMTP_CONNECTIONS: never more connections than allowed, over threads and processes."""

import os
import subprocess
import sys
import threading
import time

import pytest
from django.conf import settings as project
from django.db import connection

from emails import slots
from emails.models import Delivery
from emails.slots import smtp_slot
from emails.states import State
from emails.tasks import deliver
from tests.tools import database_url, eventually

pytestmark = pytest.mark.django_db(transaction=True)

HOLD = """
import time
import django
django.setup()
from emails.slots import smtp_slot
with smtp_slot(0) as free:
    print(free, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def close_own_connection():
    yield
    if hasattr(slots._own, "database"):
        slots._own.database.close()
        del slots._own.database


@pytest.fixture
def other_process():
    """A process that holds the only slot."""
    environment = {
        "PATH": os.environ["PATH"],
        "DJANGO_SETTINGS_MODULE": "mailroom.settings",
        "SECRET_KEY": "only-for-tests",
        "HTTPS_ONLY": "false",
        "DATABASE_URL": database_url(),
        "SMTP_CONNECTIONS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=project.BASE_DIR,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_threads_never_hold_more_than_the_cap(settings):
    settings.EMAILS_SMTP_CONNECTIONS = 2
    lock, held, counts, taken = threading.Lock(), [], [], []

    def work():
        with smtp_slot(30) as free:
            taken.append(free)
            with lock:
                held.append(1)
                counts.append(len(held))
            time.sleep(0.2)
            with lock:
                held.pop()
        slots._own.database.close()
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [True] * 5
    assert max(counts) == 2


def test_a_killed_process_frees_its_slot(settings, other_process):
    settings.EMAILS_SMTP_CONNECTIONS = 1
    with smtp_slot(0) as free:
        assert not free
    other_process.kill()

    def is_free() -> bool:
        with smtp_slot(0) as free:
            return free

    eventually(is_free, 2)


def test_without_a_free_slot_deliveries_go_back_unattempted(
    settings, other_process, delivery, mailbox
):
    settings.EMAILS_SMTP_CONNECTIONS = 1
    settings.EMAILS_SENDING_LEASE_SECONDS = 5
    Delivery.objects.update(state=State.QUEUED)
    deliver(delivery.pk)
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts) == (State.QUEUED, 0)
    assert delivery.published_at is None
    assert mailbox.connections == 0


def test_the_smtp_connection_ends_with_its_slot(settings, accept, mailbox):
    settings.EMAILS_SMTP_CONNECTIONS = 1
    for _ in range(2):
        deliver(accept().deliveries.get().pk)
    assert list(Delivery.objects.values_list("state", flat=True)) == [State.SENT] * 2
    assert mailbox.connections == 2
