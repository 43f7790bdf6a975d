"""Starts what the mail benchmarks need: broker, database, mail servers and the processes of app/, all real.

The broker is a systemd host of testbed/ (inventories/app-tests). Everything else runs as processes on this machine.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
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

PROJECT = Path(__file__).resolve().parents[1]
APP = PROJECT / "app"
BIN = APP / ".venv" / "bin"
sys.path.insert(0, str(APP))

from tests.harness import Application, Process, broker_of_test_host, free_port, wait_until  # noqa: E402 - in app/

CHILDREN = 4
# The web server closes connections after two idle seconds.
IDLE_SECONDS = 1
INVENTORY = "inventories/app-tests"
# Final states: only a person can change them.
FINAL = "('sent', 'failed', 'skipped', 'cancelled')"
# smtp-sink is unpacked here if it is not installed.
POSTFIX = PROJECT / ".ansible" / "postfix"


def in_app_environment() -> None:
    """Restart the script with the application's Python, which has the imported packages."""
    if not (BIN / "python").exists():
        sys.exit("app/.venv is missing; create it with make test-app-fast")
    if Path(sys.prefix) != APP / ".venv":
        os.execv(BIN / "python", [str(BIN / "python"), *sys.argv])  # noqa: S606 - the same script
    # SystemExit lets clean-up run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))


def say(text: str) -> None:
    print(text, flush=True)


class Broker:
    def __init__(self) -> None:
        self.testbed = [str(PROJECT / ".venv/bin/python"), "-m", "testbed"]
        self.url = broker_of_test_host()
        if not self.url:
            sys.exit("no broker; start the one of inventories/app-tests with make broker-up")

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
                except Exception:  # noqa: S112 - the queue does not exist yet
                    continue


class Sink:
    """A mail server that discards messages, and writes to the file `written` for each message."""

    def __init__(self, command: list, environment: dict, written: Path, log: Path) -> None:
        self.written = written
        written.touch()
        self.process = Process(command, environment, log, PROJECT)
        self.wait()

    def wait(self) -> None:
        if not wait_until(lambda: connects(self.port), 20):
            sys.exit(f"the mail server did not start: {self.process.log.read_text()}")

    def count(self) -> int:
        """How many messages the mail server has accepted since its start."""
        raise NotImplementedError


class PythonSink(Sink):
    """bench/smtp_sink.py, which logs every message and can simulate faults."""

    def __init__(self, directory: Path, delay: float = 0, connections: int | None = None) -> None:
        self.port = free_port()
        messages = directory / "messages"
        command = [BIN / "python", PROJECT / "bench/smtp_sink.py", self.port, messages, f"--delay={delay}"]
        if connections is not None:
            command.append(f"--connections={connections}")
        self.counted = self.read = 0
        super().__init__(command, {"PATH": os.environ["PATH"]}, messages, directory / "smtp_sink.log")

    def count(self) -> int:
        with self.written.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        self.read += len(new)
        self.counted += new.count(b"\n")
        return self.counted

    def taken(self) -> list[tuple[float, str, str]]:
        lines = self.written.read_text().splitlines()
        return [(float(at), message_id, address) for at, message_id, address in (line.split() for line in lines)]

    def refused_connections(self) -> int:
        return self.process.log.read_text().count("421 too many connections")

    def copies(self) -> Counter:
        """How many messages were accepted, by recipient."""
        return Counter(address for _, _, address in self.taken())


class CSink(Sink):
    """Postfix's smtp-sink, which needs much less processor time than a server in Python. It prints a running count of messages."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        program, libraries = smtp_sink()
        # smtp-sink refuses to run as root.
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        command = [program, "-4", "-c", *user, f"127.0.0.1:{self.port}", "128"]
        environment = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(libraries)}
        log = directory / "c_sink.log"
        super().__init__(command, environment, log, log)

    def count(self) -> int:
        with self.written.open("rb") as file:
            file.seek(max(self.written.stat().st_size - 200, 0))
            counts = re.findall(rb"mesg=(\d+)\r", file.read())
        return int(counts[-1]) if counts else 0


def smtp_sink() -> tuple[Path, Path]:
    """The program and its libraries. The package is only unpacked, so that no mail service is installed or started."""
    if installed := shutil.which("smtp-sink", path=f"{os.environ['PATH']}:/usr/sbin"):
        return Path(installed), Path("/usr/lib/postfix")
    program, libraries = POSTFIX / "usr/sbin/smtp-sink", POSTFIX / "usr/lib/postfix"
    if not program.exists():
        if not shutil.which("apt-get"):
            sys.exit("smtp-sink not found, and no apt-get to download it; install Postfix")
        say(f"downloading Debian's package postfix for smtp-sink and unpacking it in {POSTFIX.relative_to(PROJECT)}")
        with tempfile.TemporaryDirectory() as directory:
            command = ["apt-get", "-qq", "download", "postfix"]
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
            packages = list(Path(directory).glob("postfix_*.deb"))
            if not packages:
                sys.exit(f"downloading the package postfix failed: {done.stderr}")
            subprocess.run(["dpkg-deb", "-x", packages[0], POSTFIX], check=True)
    environment = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(libraries)}
    linked = subprocess.run(["ldd", program], env=environment, capture_output=True, text=True, check=True).stdout
    if missing := re.findall(r"(\S+) => not found", linked):
        sys.exit(f"smtp-sink needs the libraries {', '.join(missing)}; install the packages that postfix depends on")
    return program, libraries


def connects(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Client:
    """Sends requests over a persistent connection, as another service's client does."""

    def __init__(self, port: int, key: str, timeout: float = 10) -> None:
        self.port, self.key, self.timeout = port, key, timeout
        self.connection, self.used = None, 0.0

    def post(self, path: str, body: dict, headers: dict | None = None) -> tuple[int, dict]:
        return self.request("POST", path, json.dumps(body), headers)

    def request(self, method: str, path: str, body: str | None = None, headers: dict | None = None) -> tuple[int, dict]:
        if self.connection is not None and time.monotonic() - self.used > IDLE_SECONDS:
            self.connection.close()
            self.connection = None
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"} | (headers or {})
        try:
            self.connection.request(method, path, body, headers)
            response = self.connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            self.connection = None
            raise ConnectionError(str(error)) from error
        self.used = time.monotonic()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else {}


class AppStack(Application):
    """The processes of app/ as in production, with a mail server."""

    QUEUES = ("mail.v1", "mail.dead.v1", "maintenance.v1")

    def __init__(
        self,
        broker: Broker,
        database_url: str,
        sink: PythonSink,
        directory: Path,
        children: int,
        variables: dict[str, str],
    ) -> None:
        self.broker, self.sink, self.children = broker, sink, children
        self.processes: dict[str, Process] = {}
        super().__init__(directory, database_url, broker.url, sink.port, **{"LOG_LEVEL": "INFO", **variables})

    def start(self, *names: str) -> None:
        """Start processes: web, relay, worker, second_worker."""
        for name in names:
            if name == "web":
                self.processes[name] = self.web()
                self.wait_for_web(self.processes[name])
            elif name == "relay":
                self.processes[name] = self.relay()
            else:
                self.processes[name] = self.worker(name, "mail.v1", self.children)

    def wait_for_workers(self, *names: str) -> None:
        for name in names:
            self.wait_for_worker(self.processes[name])

    def unfinished(self) -> int:
        """The number of deliveries that are not in a final state; -1 if the database does not respond."""
        import psycopg

        try:
            return self.query(f"SELECT count(*) FROM emails_delivery WHERE state NOT IN {FINAL}")[0][0]  # noqa: S608 - a constant
        except psycopg.OperationalError:
            return -1

    def query(self, statement: str) -> list[tuple]:
        return query(self.environment["DATABASE_URL"], statement)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()


@contextmanager
def running(
    broker: Broker,
    database_url: str,
    *names: str,
    delay: float = 0,
    connections: int | None = None,
    children: int = CHILDREN,
    **variables: str,
):
    """An AppStack with these processes; `delay` and `connections` are for its mail server, `variables` for the application."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        sink, stack = PythonSink(Path(directory), delay, connections), None
        try:
            stack = AppStack(broker, database_url, sink, Path(directory), children, variables)
            broker.purge(list(AppStack.QUEUES))
            stack.start(*names)
            yield stack
        finally:
            if stack:
                stack.end()
            sink.process.kill()
            if keep := os.environ.get("BENCH_KEEP"):  # keeps the logs
                subprocess.run(["cp", "-r", directory, keep], check=False)


def in_threads(count: int, work) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def query(url: str, statement: str) -> list[tuple]:
    import psycopg

    with psycopg.connect(url, connect_timeout=5) as connection:
        return connection.execute(statement).fetchall()
