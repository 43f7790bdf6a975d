"""The program with which the role celery runs beat and notifies systemd."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "roles" / "celery" / "files" / "celery-beat.py"
NOTIFICATION = b"READY=1\nWATCHDOG=1"
PROJECT = """
from celery import Celery, beat

class Once(beat.Scheduler):
    def setup_schedule(self):
        self.install_default_entries({})
        self.update_from_dict({"one": {"task": "one", "schedule": 0.1}})

class Stuck(beat.Scheduler):
    def tick(self, *args, **kwargs):
        import time
        time.sleep(60)

class Patient(beat.Scheduler):
    def tick(self, *args, **kwargs):
        return 60

app = Celery("project", broker="BROKER")
app.conf.beat_scheduler = "project:SCHEDULER"
"""


@pytest.fixture
def beat(tmp_path):
    """Return a function that starts beat, and returns its process and systemd's socket.

    Beat must notify systemd within `watchdog` seconds.
    """
    processes = []
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "notify"))
    systemd.settimeout(5)

    def start(scheduler, broker="memory://", watchdog=4):
        project = PROJECT.replace("SCHEDULER", scheduler).replace("BROKER", broker)
        (tmp_path / "project.py").write_text(project)
        words = ["--app=project", "beat", "--loglevel=INFO", "--schedule=schedule", "--pidfile="]
        words.append("--scheduler=__main__:scheduler")
        variables = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": str(watchdog * 1_000_000),
        }
        with (tmp_path / "log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, PROGRAM, *words],
                    cwd=tmp_path,
                    env={"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", **variables},
                    stdout=log,
                    stderr=log,
                )
            )
        return processes[0], systemd

    yield start
    for process in processes:
        process.kill()
        process.wait()
    systemd.close()


def test_beat_notifies_systemd_and_names_the_projects_scheduler(beat, tmp_path):
    process, systemd = beat("Once")
    log = tmp_path / "log"
    until = time.monotonic() + 20
    while "Sending due task one (one)" not in log.read_text():
        assert time.monotonic() < until
        assert systemd.recv(99) == NOTIFICATION
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert ". scheduler -> project.Once" in log.read_text()


def test_idle_beat_notifies_systemd_within_the_time_of_the_watchdog(beat):
    """A schedule without a due task lets beat sleep for longer than the watchdog permits."""
    _, systemd = beat("Patient", watchdog=4)
    assert systemd.recv(99) == NOTIFICATION
    systemd.settimeout(4)
    assert systemd.recv(99) == NOTIFICATION


def test_beat_notifies_systemd_while_it_waits_for_the_broker(beat, tmp_path):
    process, systemd = beat("Once", broker="amqp://127.0.0.1:1//")
    log = tmp_path / "log"
    until = time.monotonic() + 20
    while log.read_text().count("Connection error") < 2:
        assert time.monotonic() < until
        # Before the first error, each loop notifies systemd.
        systemd.recv(99)
    assert process.poll() is None


def test_beat_with_a_stuck_scheduler_does_not_notify_systemd(beat, tmp_path):
    process, systemd = beat("Stuck")
    systemd.settimeout(3)
    with pytest.raises(TimeoutError):
        systemd.recv(99)
    assert "beat: Starting..." in (tmp_path / "log").read_text()
    assert process.poll() is None
