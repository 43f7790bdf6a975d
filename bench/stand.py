"""The parts that the measurements of mail share: broker, database, mail server and the processes of app/, all real.

The broker is a systemd host of testbed/ (inventories/app-tests); all else runs here, as processes that are ended by their id.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

PROJECT = Path(__file__).resolve().parents[1]
APP = PROJECT / "app"
BIN = APP / ".venv" / "bin"
# As the roles start them.
GUNICORN = (
    BIN / "gunicorn",
    "--no-control-socket",
    "--workers=2",
    "--threads=4",
    "--worker-tmp-dir=/dev/shm",
    "--access-logfile=-",
)
WORKER_OPTIONS = (
    "--concurrency=4",
    "--without-gossip",
    "--without-mingle",
    "--task-events",
    "--prefetch-multiplier=4",
    "--loglevel=INFO",
)
INVENTORY = "inventories/app-tests"


def in_app_environment() -> None:
    """Starts the script again with the application's Python, which has what it imports."""
    if not (BIN / "python").exists():
        sys.exit("app/.venv is missing: make test-app-fast makes it")
    if Path(sys.prefix) != APP / ".venv":
        os.execv(BIN / "python", [str(BIN / "python"), *sys.argv])  # noqa: S606 - the same script
    # So that what was started is ended, however the script is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))


def say(text: str) -> None:
    print(text, flush=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(check, seconds: float, pause: float = 0.2) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(pause)
    return False


class Process:
    """A command with all that it starts. `restart` is what systemd does with one that died."""

    def __init__(self, command: list, environment: dict, log: Path, directory: Path = APP) -> None:
        self.command = [str(part) for part in command]
        self.environment, self.log, self.directory = environment, log, directory
        self.process = None
        self.start()

    def start(self) -> None:
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                self.command, cwd=self.directory, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def kill(self) -> None:
        """As a power cut would; nothing can be said before it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def restart(self, after: float = 2) -> None:
        self.kill()
        time.sleep(after)
        self.start()


class Broker:
    def __init__(self) -> None:
        self.testbed = [str(PROJECT / ".venv/bin/python"), "-m", "testbed"]
        status = subprocess.run(
            [*self.testbed, "info", "--inventory", INVENTORY, "--value", "broker.url"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        self.url = status.stdout.strip()
        if status.returncode or not self.url:
            sys.exit("no broker: make broker-up starts the one of inventories/app-tests")

    def run(self, *command: str) -> None:
        subprocess.run(
            [*self.testbed, "exec", "--inventory", INVENTORY, "broker1", "--", *command],
            cwd=PROJECT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        self.run("systemctl", "stop", "rabbitmq-server")

    def start(self) -> None:
        self.run("systemctl", "start", "rabbitmq-server")

    def kill(self) -> None:
        self.run("systemctl", "kill", "--kill-whom=all", "--signal=KILL", "rabbitmq-server")

    def alarm(self, on: bool) -> None:
        self.run("rabbitmqctl", "-q", "set_vm_memory_high_watermark", *(("absolute", "1MB") if on else ("0.6",)))

    @contextmanager
    def connection(self):
        from kombu import Connection

        with Connection(self.url, connect_timeout=5) as connection:
            yield connection

    def purge(self, names: list[str]) -> None:
        with self.connection() as connection:
            for name in names:
                channel = connection.channel()
                try:
                    channel.queue_purge(name)
                except Exception:  # noqa: S112 - there is no such queue yet
                    continue


class Catcher:
    def __init__(self, directory: Path, delay: float = 0) -> None:
        self.port, self.log = free_port(), directory / "caught"
        self.log.touch()
        command = [BIN / "python", PROJECT / "bench/catcher.py", self.port, self.log, delay]
        self.process = Process(command, {"PATH": os.environ["PATH"]}, directory / "catcher.log", PROJECT)
        self.wait()

    def wait(self) -> None:
        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self.port)) == 0

        if not wait_until(answers, 20):
            sys.exit(f"the mail server does not start: {self.process.log.read_text()}")

    def taken(self) -> list[tuple[float, str, str]]:
        lines = self.log.read_text().splitlines()
        return [(float(at), message_id, address) for at, message_id, address in (line.split() for line in lines)]

    def copies(self) -> Counter:
        """How often each pair of Message-ID and recipient was taken."""
        return Counter((message_id, address) for _, message_id, address in self.taken())


class Client:
    """Posts over a connection that stays open, as a program in the same network would."""

    def __init__(self, port: int, key: str, timeout: float = 10) -> None:
        self.port, self.key, self.timeout = port, key, timeout
        self.connection = None

    def post(self, path: str, body: dict, headers: dict | None = None) -> tuple[int, dict]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"} | (headers or {})
        try:
            self.connection.request("POST", path, json.dumps(body), headers)
            response = self.connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            self.connection = None
            raise ConnectionError(str(error)) from error
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else {}


class Stand:
    """app/ as it is deployed: web, relay and a worker, on a database of its own."""

    QUEUES = ("mail.v1", "mail.dead.v1", "maintenance.v1")

    def __init__(self, broker: Broker, database_url: str, directory: Path, delay: float = 0, **variables: str) -> None:
        self.broker, self.directory = broker, directory
        self.catcher = Catcher(directory, delay)
        self.port, self.key = free_port(), secrets.token_urlsafe(32)
        self.environment = {
            "PATH": os.environ["PATH"],
            "SECRET_KEY": secrets.token_urlsafe(50),
            "HTTPS_ONLY": "false",
            "ALLOWED_HOSTS": "127.0.0.1",
            "DATABASE_URL": database_url,
            "BROKER_URL": broker.url,
            "EMAIL_URL": f"smtp://127.0.0.1:{self.catcher.port}",
            "LOG_LEVEL": "INFO",
            **variables,
        }
        self.manage("migrate", "-v0")
        admin = {"username": "root", "password": "secret", "api_key": self.key}
        self.manage("ensure_admin", input=json.dumps(admin))
        self.processes: dict[str, Process] = {}

    def manage(self, *arguments: str, **options) -> str:
        done = subprocess.run(
            [str(BIN / "python"), "manage.py", *arguments],
            cwd=APP,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        if done.returncode:
            sys.exit(f"manage.py {arguments[0]} failed: {done.stderr}")
        return done.stdout

    def start(self, *names: str) -> None:
        commands = {
            "web": [*GUNICORN, f"--bind=127.0.0.1:{self.port}", "mailroom.wsgi:application"],
            "relay": [BIN / "python", "manage.py", "relay"],
            "worker": [BIN / "celery", "--app=mailroom", "worker", "--queues=mail.v1", "--hostname=mail@%h", *WORKER_OPTIONS],
        }
        for name in names:
            self.processes[name] = Process(commands[name], self.environment, self.directory / f"{name}.log")
        if "web" in names:
            self.wait_for_web()

    def wait_for_web(self) -> None:
        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self.port)) == 0

        if not wait_until(answers, 60):
            sys.exit(f"the web server does not start: {self.processes['web'].log.read_text()[-3000:]}")

    def end(self) -> None:
        for process in (*self.processes.values(), self.catcher.process):
            process.kill()


@contextmanager
def running(broker: Broker, database_url: str, *names: str, **options):
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        stand = Stand(broker, database_url or f"sqlite:///{directory}/db.sqlite3", Path(directory), **options)
        try:
            broker.purge(list(Stand.QUEUES))
            stand.start(*names)
            yield stand
        finally:
            stand.end()
            if keep := os.environ.get("BENCH_KEEP"):  # to look at what happened
                subprocess.run(["cp", "-r", directory, keep], check=False)


def in_threads(count: int, work) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def with_database(url: str, name: str) -> str:
    """The URL of a new, empty database on the same server."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name}")
    return urlsplit(url)._replace(path=f"/{name}").geturl()


def query(url: str, statement: str) -> list[tuple]:
    """Of either database."""
    if url.startswith("sqlite"):
        import sqlite3

        with sqlite3.connect(url.removeprefix("sqlite:///"), timeout=20) as connection:
            return connection.execute(statement).fetchall()
    import psycopg

    with psycopg.connect(url) as connection:
        return connection.execute(statement).fetchall()
