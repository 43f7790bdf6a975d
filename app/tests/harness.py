"""Starts the application's processes, for the tests and for the benchmarks in bench/.

Imports no package at the top, because bench/ restarts itself with the application's Python.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

APP = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
START_SECONDS = 60
# The command lines have the options of the roles django and celery.
GUNICORN = (
    str(BIN / "gunicorn"),
    "--no-control-socket",
    "--workers=2",
    "--threads=4",
    "--worker-tmp-dir=/dev/shm",
    "--access-logfile=-",
)
WORKER = (
    *(str(BIN / "celery"), "--app=mailroom", "worker"),
    *("--without-gossip", "--without-mingle", "--task-events"),
    *("--prefetch-multiplier=4", "--loglevel=INFO"),
)
# Prints the URL of the broker that `make broker-up` starts.
TEST_HOST = (
    *(".venv/bin/python", "-m", "testbed", "info"),
    *("--inventory", "inventories/app-tests", "--value", "broker.url"),
)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_until(check: Callable[[], T], seconds: float, pause: float = 0.2) -> T | None:
    """Repeats `check` until it returns a true value; returns None after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := check():
            return answer
        time.sleep(pause)
    return None


def eventually(check: Callable[[], T], seconds: float = 30) -> T:
    """Repeats `check` until it returns a true value; fails after `seconds`."""
    answer = wait_until(check, seconds, pause=0.05)
    if answer is None:
        raise AssertionError(f"not within {seconds} seconds: {check.__name__}")
    return answer


def is_healthy(port: int) -> bool:
    """Whether a web server responds to a health check with 200."""
    connection = HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def broker_of_test_host() -> str:
    """The URL of the broker that `make broker-up` starts, or "" if it is not up."""
    with suppress(OSError):
        options: dict[str, Any] = {"cwd": APP.parent, "text": True, "start_new_session": True}
        asked = subprocess.run(TEST_HOST, capture_output=True, check=False, **options)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return ""


def create_database(server: str, name: str) -> str:
    """Creates an empty database, replacing one of that name; returns its URL."""
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name}")
    return urlsplit(server)._replace(path=f"/{name}").geturl()


class Process:
    """A command and its children. As a context manager, it is killed at the end."""

    def __init__(
        self, command: tuple, environment: dict[str, str], log: Path, directory: Path = APP
    ) -> None:
        self.command = [str(part) for part in command]
        self.environment, self.log, self.directory = environment, log, directory
        self.start()

    def start(self) -> None:
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        """Kills the processes with SIGKILL, as in a power failure."""
        if not self.has_ended():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def restart(self, after: float = 2) -> None:
        """Kills the processes and starts them again, as systemd does after a crash."""
        self.kill()
        time.sleep(after)
        self.start()

    def wait_until(self, check: Callable[[], T]) -> None:
        """Waits until `check` returns a true value; fails with the log if the process ends."""
        if not wait_until(lambda: self.has_ended() or check(), START_SECONDS) or self.has_ended():
            raise RuntimeError(f"{' '.join(self.command)} is not ready: {self.log.read_text()}")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the process and prints its output, which pytest shows if the test failed."""
        self.kill()
        print(f"--- {' '.join(self.command)}\n{self.log.read_text()}")


class Application:
    """The application's web server, relay and workers, as the roles start them."""

    def __init__(
        self,
        directory: Path,
        database_url: str,
        broker_url: str,
        smtp_port: int,
        **variables: str,
    ) -> None:
        self.directory, self.port = directory, free_port()
        self.key = secrets.token_urlsafe(32)
        self.environment = {
            "PATH": os.environ["PATH"],
            "SECRET_KEY": secrets.token_urlsafe(50),
            "HTTPS_ONLY": "false",
            "ALLOWED_HOSTS": HOST,
            "DATABASE_URL": database_url,
            "BROKER_URL": broker_url,
            "EMAIL_URL": f"smtp://{HOST}:{smtp_port}",
            **variables,
        }
        self.manage("migrate", "-v0")
        admin = {"username": "root", "password": "secret", "api_key": self.key}
        self.manage("ensure_admin", input=json.dumps(admin))

    def manage(self, *arguments: str, **options: Any) -> None:
        command = (sys.executable, "manage.py", *arguments)
        options |= {"cwd": APP, "env": self.environment, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **options)
        if done.returncode:
            raise RuntimeError(f"manage.py {arguments[0]} failed: {done.stderr}")

    def launch(self, name: str, *command: str, **variables: str) -> Process:
        """Starts a process with its own log."""
        log = self.directory / f"{name}-{secrets.token_hex(4)}.log"
        return Process(command, self.environment | variables, log)

    def web(self) -> Process:
        command = (*GUNICORN, f"--bind={HOST}:{self.port}", "mailroom.wsgi:application")
        return self.launch("web", *command)

    def relay(self, **variables: str) -> Process:
        return self.launch("relay", sys.executable, "manage.py", "relay", **variables)

    def worker(self, name: str, queues: str, children: int, **variables: str) -> Process:
        options = (f"--hostname={name}@%h", f"--queues={queues}", f"--concurrency={children}")
        return self.launch(name, *WORKER, *options, **variables)

    def wait_for_web(self, web: Process) -> None:
        web.wait_until(lambda: is_healthy(self.port))

    def wait_for_worker(self, worker: Process) -> None:
        worker.wait_until(lambda: re.search(r" ready\.$", worker.log.read_text(), re.MULTILINE))
