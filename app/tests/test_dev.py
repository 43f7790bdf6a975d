"""Tests `make app`, which runs the application on a developer's machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from django.conf import settings

from dev import __main__ as dev
from tests import harness
from tests.harness import eventually, free_port

BROKER_URL = os.environ.get("TEST_BROKER_URL", "")


class Run:
    """`python -m dev` in its own session. A test signals its process group, as Ctrl-C does."""

    def __init__(self, directory: Path, **variables: str) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.web_port, self.mail_port = free_port(), free_port()
        env = {
            "PATH": os.environ["PATH"],
            "TMPDIR": str(directory),
            "BROKER_URL": BROKER_URL,
            "WEB_PORT": str(self.web_port),
            "MAIL_PORT": str(self.mail_port),
        }
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dev"],
                cwd=settings.BASE_DIR,
                env=env | variables,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def pids(self) -> set[int]:
        """The run's processes, found by their TMPDIR."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended
                if f"TMPDIR={self.directory}".encode() in path.read_bytes():
                    found.add(int(path.parent.name))
        return found

    def folders(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if path.is_dir()]

    def printed(self, name: str) -> str:
        line = re.search(rf"^{name}  +(.*)$", self.log.read_text(), re.MULTILINE)
        return line[1] if line else ""


@contextmanager
def running(**variables: str):
    # The folder is not pytest's, because the database server's user can't access pytest's folder.
    directory = Path(tempfile.mkdtemp(prefix="dev-"))
    directory.chmod(0o755)
    run = Run(directory, **variables)
    try:
        yield run
    finally:
        for pid in run.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()
        print(run.log.read_text())
        shutil.rmtree(directory)


def gone(pid: int) -> bool:
    """A zombie counts as ended, because its parent may not have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def page(url: str) -> str:
    try:
        with urlopen(url, timeout=5) as response:
            return response.read().decode()
    except URLError:
        return ""


@pytest.mark.broker
@pytest.mark.skipif(not BROKER_URL, reason="TEST_BROKER_URL names no broker")
def test_posted_email_is_on_the_mail_page_and_ctrl_c_stops_everything():
    with running() as run:
        eventually(lambda: page(f"http://127.0.0.1:{run.web_port}/healthz"))
        email = {"subject": "To <all>", "text": "1 < 2", "to": ["bob@example.org"]}
        request = Request(
            f"{run.printed('page')}api/emails",
            data=json.dumps(email).encode(),
            headers={
                "Authorization": f"Bearer {run.printed('API key')}",
                "Content-Type": "application/json",
            },
        )
        with urlopen(request, timeout=5) as response:
            assert response.status == 202
        mails = run.printed("mail")
        eventually(lambda: "To &lt;all&gt;" in page(mails))
        assert "bob@example.org" in page(mails)
        assert "1 &lt; 2" in page(f"{mails}1")

        pids = run.pids()
        # Four processes, one child of the web server, and two children of the worker.
        assert len(pids) >= 7
        (folder,) = run.folders()
        pids.add(int((folder / "data/postmaster.pid").read_text().split()[0]))
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.process.wait(timeout=20) == 0
        assert [pid for pid in pids if not gone(pid)] == []
        assert run.folders() == []
        # Each line after the table starts with the name of its process; the relay prints nothing.
        _, _, output = run.log.read_text().partition("database  ")
        lines = [line.partition(" | ")[0].rstrip() for line in output.splitlines()[1:]]
        assert set(lines) == {"mail", "web", "worker"}


@pytest.mark.broker
@pytest.mark.skipif(not BROKER_URL, reason="TEST_BROKER_URL names no broker")
def test_signal_during_the_start_leaves_nothing_behind():
    with running() as run:
        eventually(run.folders)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.process.wait(timeout=30) == 0
        assert run.folders() == []
        assert run.pids() == set()


def test_taken_port_is_reported_before_anything_starts():
    port = free_port()
    with dev.socket.create_server(("127.0.0.1", port)), running(WEB_PORT=str(port)) as run:
        assert run.process.wait(timeout=10) == 1
        assert f"Port {port} can't be used" in run.log.read_text()
        assert "WEB_PORT" in run.log.read_text()
        assert run.folders() == []


def test_missing_broker_is_reported_before_anything_starts():
    with running(BROKER_URL="amqp://guest:guest@127.0.0.1:1//") as run:
        assert run.process.wait(timeout=10) == 1
        (line,) = run.log.read_text().splitlines()
        assert line == "No broker responds at the host and port of BROKER_URL."
        assert run.folders() == []


@pytest.mark.parametrize(
    "script",
    ("exit 1", "echo 'amqp://mailroom:<< error 1 >>@127.0.0.1:<< error 2 >>/mailroom'", None),
)
def test_stopped_test_host_is_no_broker(monkeypatch, script):
    monkeypatch.delenv("BROKER_URL", raising=False)
    command = ("sh", "-c", script) if script else ("/nowhere/python",)
    monkeypatch.setattr(harness, "TEST_HOST", command)
    with pytest.raises(SystemExit, match="set BROKER_URL, or start the test host"):
        dev.broker_url()


def test_test_host_is_the_default_broker(monkeypatch):
    monkeypatch.delenv("BROKER_URL", raising=False)
    with dev.socket.create_server(("127.0.0.1", 0)) as server:
        url = f"amqp://mailroom:secret@127.0.0.1:{server.getsockname()[1]}/mailroom"
        monkeypatch.setattr(harness, "TEST_HOST", ("sh", "-c", f"echo {url}"))
        assert dev.broker_url() == url
