"""Tests real processes while their PostgreSQL server is silent or full."""

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from urllib.error import HTTPError

import psycopg
import pytest

from tests.harness import eventually
from tests.postgresql import Postgresql
from tests.test_system import BROKER_URL, System, empty_queues

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(not BROKER_URL, reason="TEST_BROKER_URL names no broker"),
]
IPTABLES = shutil.which("iptables", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
needs_firewall = pytest.mark.skipif(
    os.geteuid() != 0 or not IPTABLES, reason="only root can drop packets"
)

ANSWER_SECONDS = 6  # the longest wait for a 503
RECOVERY_SECONDS = 10


@pytest.fixture
def database():
    with Postgresql(fsync="off", max_connections="40") as server:
        yield server


@pytest.fixture
def chain(tmp_path, mailbox, settings, database):
    """Web server, relay and worker."""
    system = System(tmp_path, settings.EMAIL_PORT, database.url())
    empty_queues()
    with system.web(), system.relay(), system.worker():
        system.wait_for(system.post(), "sent")
        yield system


@contextmanager
def packets_dropped(port: int):
    """Drops all packets to and from the port."""
    rules = [
        ("INPUT", "-i", "lo", "-p", "tcp", side, str(port), "-j", "DROP")
        for side in ("--dport", "--sport")
    ]
    try:
        for rule in rules:
            subprocess.run([IPTABLES, "-w", "-I", *rule], check=True)
        yield
    finally:
        for rule in rules:
            subprocess.run([IPTABLES, "-w", "-D", *rule], check=False)


def answer(chain: System, path: str) -> tuple[int, float]:
    """The status and duration of a request."""
    began = time.monotonic()
    try:
        email = {"subject": "Hello", "text": "Body", "to": ["bob@example.org"]}
        status = chain.request(path, email if path == "/api/emails" else None, timeout=20)["status"]
    except HTTPError as error:
        status = error.code
    return status, time.monotonic() - began


@needs_firewall
def test_requests_get_timely_503s_from_a_silent_database_and_recover(chain, database):
    with packets_dropped(database.port):
        for _ in range(2):  # with the connection that was open, then without one
            for path in ("/api/emails", "/healthz"):
                status, seconds = answer(chain, path)
                assert status == 503
                assert seconds < ANSWER_SECONDS, path
    restored = time.monotonic()
    eventually(lambda: answer(chain, "/healthz")[0] == 200, seconds=RECOVERY_SECONDS)
    email_id = chain.post()
    # The relay's listening connection was half open, and must recover too.
    chain.wait_for(email_id, "sent", timeout=RECOVERY_SECONDS)
    assert time.monotonic() - restored < RECOVERY_SECONDS + 2
    with psycopg.connect(database.url()) as connection:
        count = connection.execute("SELECT count(*) FROM emails_email").fetchone()[0]
    assert count == 2, "expected the emails before and after; a 503 must store nothing"


def test_requests_get_timely_503s_from_a_full_database_and_no_email_is_lost(chain, database):
    taken = []
    with psycopg.connect(database.url(), autocommit=True) as admin:
        # Terminates the application's connections; other clients take all connection slots.
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        try:
            while True:
                taken.append(psycopg.connect(database.url()))
        except psycopg.OperationalError:
            pass
        statuses = set()
        try:
            for _ in range(8):
                status, seconds = answer(chain, "/api/emails")
                assert seconds < ANSWER_SECONDS
                statuses.add(status)
        finally:
            for connection in taken:
                connection.close()
        assert 503 in statuses
    eventually(lambda: answer(chain, "/healthz")[0] == 200, seconds=RECOVERY_SECONDS)
    chain.wait_for(chain.post(), "sent", timeout=RECOVERY_SECONDS)
    with psycopg.connect(database.url()) as connection:
        # Emails that were accepted during the outage are sent too.
        def unsent():
            states = connection.execute(
                "SELECT count(*) FROM emails_delivery WHERE state <> 'sent'"
            )
            connection.commit()
            return states.fetchone()[0]

        eventually(lambda: unsent() == 0, seconds=RECOVERY_SECONDS)
