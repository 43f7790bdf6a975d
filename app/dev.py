"""Runs the application for a developer, without Ansible: `make app`. Ctrl-C ends all of it.

A PostgreSQL server of its own, the web server, a relay, a worker and a mail catcher. The broker is
BROKER_URL, or else the test host of `make broker-up`. WEB_PORT and MAIL_PORT choose other ports.
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

from tests.postgresql import Postgresql

APP = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
STOP_SECONDS = 15


def broker_url() -> str:
    if url := os.environ.get("BROKER_URL"):
        return url
    testbed = [APP.parent / ".venv/bin/python", "-m", "testbed", "info"]
    options = ["--inventory", "inventories/app-tests", "--value", "broker.url"]
    if testbed[0].exists():
        found = subprocess.run(
            [*testbed, *options], cwd=APP.parent, capture_output=True, text=True, check=False
        )
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    sys.exit("No broker: set BROKER_URL to a RabbitMQ's URL, or run `make broker-up` first.")


def port(name: str, default: int) -> int:
    number = int(os.environ.get(name, default))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            sys.exit(f"Port {number} is taken: set {name} to a free one.")
        found: int = probe.getsockname()[1]
        return found


def show(name: str, process: subprocess.Popen[str]) -> None:
    """Prints the lines of a process behind its name."""
    for line in process.stdout or ():
        print(f"{name:7} {line}", end="", flush=True)


def run(environment: dict[str, str], commands: dict[str, list[str]]) -> None:
    """Runs the commands until one ends, or until this process is told to stop."""
    processes: dict[str, subprocess.Popen[str]] = {}
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    try:
        for name, command in commands.items():
            processes[name] = subprocess.Popen(
                command,
                cwd=APP,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # with its children, such as a worker's
            )
            args = (name, processes[name])
            threading.Thread(target=show, args=args, daemon=True).start()
        while not stopping.wait(0.5):
            for name, process in processes.items():
                if process.poll() is not None:
                    print(f"{name} ended with {process.returncode}, so all ends.")
                    return
    finally:
        stop(list(processes.values()))


def stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever of it is left


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the database is removed
    broker = broker_url()
    web, page = port("WEB_PORT", 8000), port("MAIL_PORT", 8025)
    smtp = port("SMTP_PORT", 0)
    password, key = secrets.token_urlsafe(12), secrets.token_urlsafe(32)
    print("Starting PostgreSQL", flush=True)
    with Postgresql(fsync="off") as database:
        environment = os.environ | {
            "DEBUG": "true",
            "DATABASE_URL": database.url(),
            "BROKER_URL": broker,
            "EMAIL_URL": f"smtp://127.0.0.1:{smtp}",
            "PYTHONUNBUFFERED": "1",
        }
        manage = [sys.executable, "manage.py"]
        for command, given in (
            (["migrate", "-v0"], None),
            (["ensure_admin"], {"username": "admin", "password": password, "api_key": key}),
        ):
            subprocess.run(
                [*manage, *command],
                cwd=APP,
                env=environment,
                input=json.dumps(given),
                text=True,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        print(
            f"\nPage      http://127.0.0.1:{web}/ (admin, {password})"
            f"\nAPI       http://127.0.0.1:{web}/api/docs (key {key})"
            f"\nMail      http://127.0.0.1:{page}/"
            "\nCtrl-C ends it, and removes its database.\n",
            flush=True,
        )
        worker = ["-A", "mailroom", "worker", "-Q", "mail.v1,maintenance.v1", "-n", "dev@%h"]
        run(
            environment,
            {
                "mail": [sys.executable, "mail_catcher.py", str(smtp), str(page)],
                "web": [*manage, "runserver", "--noreload", f"127.0.0.1:{web}"],
                "relay": [*manage, "relay"],
                "worker": [str(BIN / "celery"), *worker, "-c", "2"],
            },
        )


if __name__ == "__main__":
    main()
