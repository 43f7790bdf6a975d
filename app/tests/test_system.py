"""Tests the whole system: web server, relay, worker and broker as real processes."""

import json
import os
import pickle
import re
import secrets
import signal
import socket
import socketserver
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from email import message_from_bytes
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psycopg
import pytest
from celery import Celery
from kombu import Connection, Producer

from emails.celery_config import DEFAULTS
from emails.queues import CONSUMED, DEAD_LETTERS, EXCHANGE
from tests.harness import Application, Process, create_database, eventually

BROKER_URL = os.environ.get("TEST_BROKER_URL", "")
QUEUES = (*CONSUMED, DEAD_LETTERS)
NOBODY = "amqp://guest:guest@127.0.0.1:1//"
EMAIL = {"subject": "Through it all", "text": "Body", "to": ["bob@example.org"]}

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(not BROKER_URL, reason="TEST_BROKER_URL names no broker"),
]


class System(Application):
    """The application with short waits. Its processes are context managers."""

    def __init__(self, directory: Path, smtp_port: int, database_url: str) -> None:
        variables = {
            "RELAY_POLL_SECONDS": "0.1",
            "RETRY_SECONDS": "1",
            # This limit sets the lease of a delivery. A test waits until the lease ends.
            "TASK_TIME_LIMIT": "6",
        }
        super().__init__(directory, database_url, BROKER_URL, smtp_port, **variables)

    @contextmanager
    def worker(self, name: str = "", **variables: str):
        name = name or f"worker-{secrets.token_hex(4)}"
        with super().worker(name, "mail.v1,maintenance.v1", 2, **variables) as worker:
            self.wait_for_worker(worker)
            yield worker

    @contextmanager
    def web(self):
        with super().web() as web:
            self.wait_for_web(web)
            yield web

    def request(
        self, path: str, data: dict | None = None, request_id: str = "", timeout: float = 5
    ) -> dict:
        request = Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(data).encode() if data else None,
            headers={
                "Authorization": f"Bearer {self.key}",
                "Content-Type": "application/json",
                "X-Request-ID": request_id,
            },
        )
        with urlopen(request, timeout=timeout) as response:
            return json.load(response) | {"status": response.status}

    def post(self, request_id: str = "") -> str:
        accepted = self.request("/api/emails", EMAIL, request_id)
        assert accepted["status"] == 202
        return accepted["id"]

    def recipient(self, email_id: str) -> dict:
        return self.request(f"/api/emails/{email_id}")["recipients"][0]

    def wait_for(self, email_id: str, state: str, timeout: float = 30) -> dict:
        def reached():
            recipient = self.recipient(email_id)
            return recipient if recipient["state"] == state else None

        return eventually(reached, timeout)


class Wire(socketserver.ThreadingTCPServer):
    """A proxy to the broker. After it is cut, it accepts and discards data.

    `break_clients` closes the clients' connections, but not those to the broker.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), None)
        self.cut = False
        self.clients: list[socket.socket] = []
        self.upstreams: list[socket.socket] = []
        url = urlsplit(BROKER_URL)
        self.broker = (url.hostname, url.port or 5672)
        self.url = url._replace(
            netloc=f"{url.username}:{url.password}@127.0.0.1:{self.server_address[1]}"
        ).geturl()

    def finish_request(self, request, client_address) -> None:
        upstream = socket.create_connection(self.broker)
        self.clients.append(request)
        self.upstreams.append(upstream)
        back = threading.Thread(target=self.copy, args=(upstream, request), daemon=True)
        back.start()
        self.copy(request, upstream)

    def break_clients(self) -> None:
        clients, self.clients = self.clients, []
        for client in clients:
            with suppress(OSError):  # already closed
                client.shutdown(socket.SHUT_RDWR)

    def copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self.cut:
                    target.sendall(data)

    @contextmanager
    def running(self):
        with self:
            threading.Thread(target=self.serve_forever, daemon=True).start()
            yield self
            self.shutdown()
            for upstream in self.upstreams:
                upstream.close()


def empty_queues() -> None:
    """Removes messages with row ids of another test's database."""
    with Connection(BROKER_URL) as connection:
        for queue in QUEUES:
            bound = queue.bind(connection.default_channel)
            bound.declare()
            bound.purge()


@pytest.fixture
def database_url(tmp_path):
    """An empty database."""
    server = os.environ["TEST_DATABASE_URL"]
    name = f"system_{secrets.token_hex(4)}"
    yield create_database(server, name)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def system(tmp_path, mailbox, settings, database_url):
    system = System(tmp_path, settings.EMAIL_PORT, database_url)
    empty_queues()
    with system.web():
        yield system


def test_posted_email_is_delivered(system, mailbox):
    with system.relay(), system.worker():
        recipient = system.wait_for(system.post(), "sent")
    assert recipient["attempts"] == 1
    (message,) = mailbox.messages
    assert message.rcpt_tos == ["bob@example.org"]
    assert b"Subject: Through it all" in message.content


def test_email_accepted_without_a_broker_is_delivered_later(system, mailbox):
    with system.relay(BROKER_URL=NOBODY) as relay:
        email_id = system.post()
        eventually(lambda: "is unavailable" in relay.log.read_text())
        assert not relay.has_ended()
        assert system.recipient(email_id)["state"] == "queued"
    with system.relay(), system.worker():
        system.wait_for(email_id, "sent")
    assert len(mailbox.messages) == 1


def test_silent_broker_blocks_the_relay_for_seconds_only(system, mailbox):
    """The broker does not respond on the open connection, as in an alarm or a network failure."""
    with (
        Wire().running() as wire,
        # One thread, because another one would take over the leases of a thread that waits forever.
        system.relay(BROKER_URL=wire.url, RELAY_THREADS="1") as relay,
        system.worker(),
    ):
        system.wait_for(system.post(), "sent")
        wire.cut = True
        email_id = system.post()
        eventually(lambda: "is unavailable" in relay.log.read_text(), seconds=15)
        assert system.recipient(email_id)["state"] == "queued"
        wire.cut = False
        # This time is less than half of the lease, so the relay has released the lease.
        system.wait_for(email_id, "sent", timeout=15)


def test_two_copies_of_a_message_send_once(system, mailbox):
    """Both messages wait in the queue until two processes are free."""
    email_id = system.post()
    system.manage("relay", "--once")
    publish = (
        "from emails.models import Delivery; from emails.tasks import deliver;"
        "deliver.delay(Delivery.objects.get().pk)"
    )
    system.manage("shell", "-v0", "-c", publish)
    mailbox.gate.clear()
    with system.worker() as worker:
        eventually(lambda: worker.log.read_text().count("received") == 2)
        eventually(lambda: "skipped" in worker.log.read_text())
        mailbox.gate.set()
        assert system.wait_for(email_id, "sent")["attempts"] == 1
    assert len(mailbox.messages) == 1


def test_email_survives_the_death_of_its_worker(system, mailbox):
    mailbox.gate.clear()
    with system.relay():
        email_id = system.post()
        with system.worker() as worker:
            assert mailbox.waiting.wait(timeout=10)
            assert system.recipient(email_id)["state"] == "sending"
            worker.kill()
        mailbox.gate.set()
        with system.worker():
            recipient = system.wait_for(email_id, "sent")
    assert recipient["attempts"] == 2
    # The server may have accepted the first message too: its client died before the reply.
    ids = {message_from_bytes(message.content)["Message-ID"] for message in mailbox.messages}
    assert ids == {f"<{email_id}.1@localhost>"}


def test_stopped_worker_finishes_its_tasks_and_requeues_the_rest(system, mailbox):
    """Stops the worker as systemd does with KillMode=mixed: only the main process gets TERM."""
    mailbox.gate.clear()
    with system.relay():
        emails = [system.post() for _ in range(6)]
        with system.worker() as worker:
            assert mailbox.waiting.wait(timeout=20)
            eventually(
                lambda: [system.recipient(email)["state"] for email in emails].count("sending") == 2
            )
            worker.process.send_signal(signal.SIGTERM)
            eventually(lambda: "warm shutdown" in worker.log.read_text().lower())
            mailbox.gate.set()
            assert worker.process.wait(timeout=30) == 0
            states = [system.recipient(email)["state"] for email in emails]
            assert states.count("sent") == 2
            assert states.count("queued") == 4
        with system.worker():
            for email in emails:
                assert system.wait_for(email, "sent")["attempts"] == 1
    assert len(mailbox.messages) == 6


def test_two_workers_with_the_same_name_keep_running(system, mailbox):
    with system.relay(), system.worker("twin") as first, system.worker("twin") as second:
        for _ in range(4):
            system.wait_for(system.post(), "sent")
        assert not first.has_ended() and not second.has_ended()


def test_worker_survives_a_half_open_connection(system, mailbox):
    """The broker has not noticed that the old connection, which owns the queues, is lost."""
    with (
        Wire().running() as wire,
        system.relay(),
        system.worker(BROKER_URL=wire.url) as worker,
    ):
        system.wait_for(system.post(), "sent")
        count = worker.log.read_text().count("Connected to")
        wire.break_clients()
        eventually(lambda: worker.log.read_text().count("Connected to") > count)
        # The broker sends prefetched messages to the lost connection, and requeues them after two
        # missed heartbeats.
        emails = [system.post() for _ in range(20)]
        eventually(
            lambda: [system.recipient(email)["state"] for email in emails].count("sent") >= 10
        )
        assert not worker.has_ended()
        assert "Unrecoverable" not in worker.log.read_text()


def test_worker_notifies_systemd_and_pings_the_watchdog(system, tmp_path):
    """The worker pings while it reconnects to the broker, but not while its event loop is stuck."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(40)
        variables = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with Wire().running() as wire, system.worker(BROKER_URL=wire.url, **variables) as worker:
            assert systemd.recv(99) == b"READY=1"
            assert systemd.recv(99) == b"WATCHDOG=1"
            wire.cut = True
            wire.break_clients()
            eventually(lambda: "Connection to broker lost" in worker.log.read_text())
            for _ in range(8):  # longer than the limit for a stuck loop
                assert systemd.recv(99) in (b"WATCHDOG=1", b"READY=1")
            wire.cut = False
            eventually(lambda: systemd.recv(99) == b"READY=1", seconds=60)
            worker.process.send_signal(signal.SIGTERM)
            eventually(lambda: systemd.recv(99) == b"STOPPING=1")


def test_task_messages_and_logs_contain_no_address_and_no_text(system, mailbox):
    with system.relay(LOG_LEVEL="DEBUG") as relay, system.worker(LOG_LEVEL="DEBUG") as worker:
        request_id = f"request-{secrets.token_hex(4)}"
        email_id = system.post(request_id)
        system.wait_for(email_id, "sent")
        logs = {"relay": relay.log.read_text(), "worker": worker.log.read_text()}
    for log in logs.values():
        assert f"request={request_id} email={email_id}" in log
        assert "bob@example.org" not in log
        assert "Through it all" not in log


def test_worker_declares_every_queue_and_runs_the_purge(system):
    with Connection(BROKER_URL) as connection:
        for queue in QUEUES:
            queue.bind(connection.default_channel).delete()
    with system.worker() as worker:
        for queue in (DEAD_LETTERS, *CONSUMED[1:]):
            with Connection(BROKER_URL) as connection:
                queue.bind(connection.default_channel).queue_declare(passive=True)
        # Celery binds each queue for delayed messages, and only warns if a queue is missing.
        assert "Failed to bind" not in worker.log.read_text()
        system.manage("shell", "-v0", "-c", "from emails.tasks import purge; purge.delay()")
        eventually(lambda: "purged 0 emails" in worker.log.read_text())


# Malformed messages

IDS = {"task": "emails.tasks.deliver", "id": "1", "lang": "py"}
JSON = {"content_type": "application/json", "content_encoding": "utf-8"}
TASK_BODY = '[[1], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
SECRET = "a-body-that-no-log-shows"
MALFORMED = {
    "a list": {"body": f'["{SECRET}"]', "headers": IDS, **JSON},
    "protocol 1": {"body": f'{{"task": "{SECRET}"}}', "headers": IDS, **JSON},
    "protocol 1 without headers": {"body": f'{{"task": "{SECRET}"}}', "headers": {}, **JSON},
    "no headers": {"body": TASK_BODY.replace("1", f'"{SECRET}"'), "headers": {}, **JSON},
    "no ids": {"body": TASK_BODY.replace("1", f'"{SECRET}"'), "headers": IDS, **JSON},
    "too large an id": {"body": TASK_BODY.replace("1", "9" * 30), "headers": IDS, **JSON},
    "keywords": {"body": TASK_BODY.replace("{}", f'{{"{SECRET}": 1}}'), "headers": IDS, **JSON},
    "an unknown task": {"body": TASK_BODY, "headers": IDS | {"task": SECRET}, **JSON},
    "a number for a name": {"body": TASK_BODY, "headers": IDS | {"task": 7}, **JSON},
    "garbage": {"body": b"\xff\x00" + SECRET.encode(), "headers": IDS, **JSON},
    "pickle": {
        "body": pickle.dumps(([SECRET], {}, {})),
        "headers": IDS,
        "content_type": "application/x-python-serialize",
        "content_encoding": "binary",
    },
    "15 MiB": {"body": TASK_BODY.replace("1", f'"{SECRET * 655_360}"'), "headers": IDS, **JSON},
    "a zlib bomb": {
        "body": zlib.compress(b"[" * 150 * 1024**2),
        "headers": IDS | {"compression": "application/x-gzip"},
        **JSON,
    },
    "broken zlib": {"body": b"x", "headers": IDS | {"compression": "application/x-gzip"}, **JSON},
    "an unknown compression": {"body": b"x", "headers": IDS | {"compression": SECRET}, **JSON},
    "eta in year 9999": {
        "body": TASK_BODY,
        "headers": IDS | {"eta": "9999-12-31T23:59:59"},
        **JSON,
    },
    "no eta": {"body": TASK_BODY, "headers": IDS | {"eta": SECRET}, **JSON},
}


def memory(process: Process) -> int:
    """The peak memory of the main process in MiB."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024


def test_malformed_messages_are_dead_lettered_and_do_not_block_mail(system, mailbox):
    """Other emails wait less than a second, no worker exits, and no log contains a body."""
    with system.relay(), system.worker() as worker, Connection(BROKER_URL) as connection:
        dead = DEAD_LETTERS.bind(connection.default_channel)
        system.wait_for(system.post(), "sent")
        used = memory(worker)
        producer = Producer(connection.default_channel)
        sent = 0

        def seconds_of_other_mail(message):
            """Seconds until an email that was posted after the malformed message is sent."""
            nonlocal sent
            mail = dict(exchange=EXCHANGE, routing_key="mail.v1", **message)
            producer.publish(mail.pop("body"), serializer=None, **mail)
            sent += 1
            began = time.monotonic()
            system.wait_for(system.post(), "sent", timeout=5)
            return time.monotonic() - began

        for name, message in MALFORMED.items():
            # Two retries, because the machine may be busy. A message that blocks the worker blocks
            # it in each attempt.
            assert any(seconds_of_other_mail(message) < 1 for _ in range(3)), name
            try:
                eventually(
                    lambda: dead.queue_declare(passive=True).message_count == sent, seconds=5
                )
            except AssertionError:
                raise AssertionError(f"not dead-lettered: {name}") from None
        log = worker.log.read_text()
        assert not worker.has_ended()
        assert log.count(" ready.") == 1, "the worker must not restart"
        assert log.count("was dead-lettered") == sent
        assert SECRET not in log and "Traceback" not in log
        assert memory(worker) - used < 150
        dead.purge()


# Remote control


def test_worker_shows_no_secret_and_refuses_control_commands(system):
    flower = Celery(broker=BROKER_URL, set_as_current=False)
    flower.conf.update(DEFAULTS)
    with system.worker("asked") as worker:
        inspect = flower.control.inspect(timeout=2)
        answers = json.dumps(inspect.conf(with_defaults=True))
        assert "task_time_limit" in answers
        for secret in (urlsplit(BROKER_URL).password, system.environment["SECRET_KEY"]):
            assert secret and secret not in answers
        for wanted in ("stats", "active_queues", "registered", "reserved", "active"):
            assert getattr(inspect, wanted)(), wanted
        for command in ("shutdown", "pool_shrink", "cancel_consumer", "rate_limit", "revoke"):
            arguments = {"queue": "mail.v1", "n": 1}
            flower.control.broadcast(command, arguments=arguments)
        time.sleep(2)
        assert not worker.has_ended()
        queues = inspect.active_queues()
        assert {queue["name"] for each in queues.values() for queue in each} == {
            "mail.v1",
            "maintenance.v1",
        }


def test_publication_that_the_broker_lost_is_detected(system, mailbox):
    """The relay detects a purged queue within a minute, and a metric counts the lost messages."""
    with system.relay() as relay, Connection(BROKER_URL) as connection:
        mail = CONSUMED[0].bind(connection.default_channel)
        email_id = system.post()
        eventually(lambda: mail.queue_declare(passive=True).message_count == 1)
        mail.purge()
        began = time.monotonic()
        with system.worker():
            system.wait_for(email_id, "sent", timeout=60)
        assert time.monotonic() - began < 60
        assert "1 publications were lost" in relay.log.read_text()
