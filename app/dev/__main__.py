"""Runs the application for development: `make app` starts it, Ctrl-C stops it.

Starts a temporary PostgreSQL, the web server, the relay, a worker and a mail catcher. BROKER_URL
sets the broker. The default is the test host that `make broker-up` starts.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tests.harness import broker_of_test_host
from tests.postgresql import Postgresql

APP = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
# Seconds after which processes that have not ended are killed.
STOP_SECONDS = 10


class Signals:
    """Records signals, so that a process that is just being started is stopped too."""

    def __init__(self) -> None:
        self.arrived = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.handle)

    def handle(self, *_: Any) -> None:
        self.arrived = True


class Processes:
    """The processes, each in its own process group, which Ctrl-C does not signal."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.started: dict[str, subprocess.Popen[str]] = {}

    def run(self, *arguments: str, **options: Any) -> None:
        command = [sys.executable, *arguments]
        options |= {"cwd": APP, "env": self.env, "text": True, "start_new_session": True}
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False, **options).returncode:
            sys.exit(f"Command failed: {' '.join(arguments)}")

    def start(self, name: str, *arguments: str) -> None:
        process = self.started[name] = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=APP,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=copy, args=(name, process.stdout), daemon=True).start()

    def ended(self) -> str:
        """The name and exit status of a process that has ended, or ""."""
        statuses = {name: process.poll() for name, process in self.started.items()}
        return next((f"{n} ({status})" for n, status in statuses.items() if status is not None), "")

    def stop(self) -> None:
        for process in self.started.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.started.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):  # the whole group has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def copy(name: str, output: IO[str]) -> None:
    for line in output:
        sys.stdout.write(f"{name:6} | {line}")
        sys.stdout.flush()


def port_of(variable: str, default: int) -> int:
    """The port from the variable; 0 means any free port. Exits if the port can't be used."""
    value = os.environ.get(variable) or default
    try:
        with socket.create_server((HOST, int(value))) as server:
            port: int = server.getsockname()[1]
            return port
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"Port {value} can't be used: {error}. Set another one in {variable}.")


def broker_url() -> str:
    """The URL of the broker. Exits if the broker does not respond."""
    if named := os.environ.get("BROKER_URL"):
        if not any(answers(url) for url in named.split(";")):
            sys.exit("No broker responds at the host and port of BROKER_URL.")
        return named
    if answers(url := broker_of_test_host()):
        return url
    sys.exit("No broker: set BROKER_URL, or start the test host with `make broker-up`.")


def answers(url: str) -> bool:
    try:
        parts = urlsplit(url)
        default = 5671 if parts.scheme == "amqps" else 5672
        with socket.create_connection((parts.hostname or HOST, parts.port or default), timeout=5):
            return parts.scheme in ("amqp", "amqps")
    except (OSError, ValueError):
        return False


def main() -> int:
    signals = Signals()
    web_port, mail_port = port_of("WEB_PORT", 8000), port_of("MAIL_PORT", 8025)
    smtp_port = port_of("SMTP_PORT", 0)
    broker = broker_url()
    # The data is temporary, so it does not have to survive a crash.
    with Postgresql(fsync="off") as server:
        processes = Processes(
            os.environ
            | {
                "DJANGO_SETTINGS_MODULE": "mailroom.settings",
                "PYTHONUNBUFFERED": "1",
                # Temporary files are deleted with the database.
                "TMPDIR": str(server.directory),
                "DEBUG": "true",
                "HTTPS_ONLY": "false",
                "DATABASE_URL": server.url(),
                "BROKER_URL": broker,
                "EMAIL_URL": f"smtp://{HOST}:{smtp_port}",
            }
        )
        admin = {"username": "admin", "password": "admin", "api_key": secrets.token_urlsafe(32)}
        try:
            processes.run("manage.py", "migrate", "-v0")
            processes.run("manage.py", "ensure_admin", input=json.dumps(admin))
            print(f"page      http://{HOST}:{web_port}/")
            print(f"login     {admin['username']} / {admin['password']}")
            print(f"API key   {admin['api_key']}")
            print(f"mail      http://{HOST}:{mail_port}/")
            print(f"database  {server.url()}", flush=True)
            processes.start("mail", "-m", "dev.mail_catcher", str(smtp_port), str(mail_port))
            processes.start("web", "manage.py", "runserver", f"{HOST}:{web_port}")
            processes.start("relay", "manage.py", "relay")
            worker = ("worker", "-Q", "mail.v1,maintenance.v1", "-n", "dev@%h", "-c", "2")
            processes.start("worker", "-m", "celery", "-A", "mailroom", *worker)
            while not signals.arrived:
                if name := processes.ended():
                    print(f"{name} has ended; stopping the other processes.")
                    return 1
                time.sleep(0.2)
        finally:
            processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
