"""Tests workers and beat from the role celery: their queues, and what happens to running tasks if a worker is stopped or killed."""

from __future__ import annotations

import time

import pytest
import requests

SLOW_MAIL_SERVER = r"""
import asyncio, sys
async def session(reader, writer):
    async def say(line):
        writer.write(line.encode() + b"\r\n")
        await writer.drain()
    await say("220 slow")
    while line := await reader.readline():
        word = line.split()[0].upper() if line.split() else b""
        if word == b"DATA":
            await say("354 go on")
            subject = ""
            while (line := await reader.readline()) not in (b".\r\n", b""):
                if line.lower().startswith(b"subject:"):
                    subject = line.split(b":", 1)[1].strip().decode()
            print("began", subject, flush=True)
            await asyncio.sleep(5)
            print("took", subject, flush=True)
            await say("250 taken")
        elif word == b"QUIT":
            await say("221 bye")
            break
        else:
            await say("250 ok")
    writer.close()
async def main():
    server = await asyncio.start_server(session, "127.0.0.1", 2525)
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.fixture(scope="module", autouse=True)
def mail_server(host):
    """An SMTP server that needs five seconds per email, and prints a line before and after each email."""
    with host.sudo():
        host.run("systemctl stop example-mail")
        host.check_output("systemd-run --unit=example-mail --setenv=PYTHONUNBUFFERED=1 python3 -c %s", SLOW_MAIL_SERVER)
    yield
    with host.sudo():
        host.run("systemctl stop example-mail")


@pytest.fixture
def mails(host):
    def said(verb, subject):
        with host.sudo():
            journal = host.check_output("journalctl --output=cat --no-pager --unit example-mail")
        return journal.splitlines().count(f"{verb} {subject}")

    return said


@pytest.fixture
def send(url, variables):
    headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}

    def post(subject):
        email = {"subject": subject, "text": "Hello.", "to": ["somebody@example.net"]}
        answer = requests.post(f"{url(8000)}/api/emails", json=email, headers=headers, timeout=5)
        assert answer.status_code == 202
        status = f"{url(8000)}/api/emails/{answer.json()['id']}"
        return lambda: requests.get(status, headers=headers, timeout=5).json()

    return post


def shown(host, unit, name):
    with host.sudo():
        return host.check_output(f"systemctl show --property {name} --value {unit}")


def test_mail_is_sent(send, mails, eventually):
    status = send("plain")
    eventually(lambda: status()["state"] == "sent", seconds=60)
    assert mails("took", "plain") == 1


def test_restart_lets_a_running_task_finish(host, send, mails, eventually):
    status = send("restart")
    eventually(lambda: mails("began", "restart") == 1)
    with host.sudo():
        host.check_output("systemctl restart mailroom-worker@mail")
    assert mails("took", "restart") == 1, "the restart finished before the task"
    eventually(lambda: status()["state"] == "sent")
    assert mails("began", "restart") == 1


def test_stop_timeout_is_longer_than_a_task_may_take(host):
    """Compares the limit on the worker's command line with the timeout in systemd."""
    for instance in ("mail", "maintenance"):
        unit = f"mailroom-worker@{instance}.service"
        command = shown(host, unit, "ExecStart")
        limit = int(command.split("--time-limit=")[1].split()[0])
        timeout = shown(host, unit, "TimeoutStopUSec")
        with host.sudo():
            seconds = int(host.check_output(f"systemd-analyze timespan '{timeout}' | awk '/μs:/ {{print $2}}'")) / 1e6
        assert seconds > limit


def test_killed_worker_comes_back_and_its_mail_is_sent(host, send, mails, eventually):
    status = send("killed")
    eventually(lambda: mails("began", "killed") == 1)
    before = shown(host, "mailroom-worker@mail", "MainPID")
    with host.sudo():
        host.check_output("systemctl kill --signal=KILL mailroom-worker@mail")
    eventually(lambda: shown(host, "mailroom-worker@mail", "MainPID") not in ("0", before))
    # The delivery stays leased for 150 s. The app's tests show that the email is sent afterwards.
    assert status()["state"] in ("queued", "sending", "sent")


def test_workers_consume_only_their_queues(host, eventually):
    def consumed():
        with host.sudo():
            consumers = host.check_output("rabbitmqctl -q list_consumers -p mailroom queue_name")
        return sorted(line for line in consumers.splitlines() if line.endswith(".v1"))

    eventually(lambda: consumed() == ["mail.v1", "maintenance.v1"])


def test_beat_runs_once_and_keeps_its_schedule(host):
    with host.sudo():
        assert host.check_output("pgrep --count --full '[c]elery.* beat '") == "1"
        assert host.file("/var/lib/mailroom-beat/schedule").user == "mailroom"


# beat would run code that an attacker writes to its schedule.
@pytest.mark.parametrize("path", ["/opt/mailroom/current/probe", "/var/lib/mailroom-beat/schedule"])
def test_worker_cannot_write_its_code_or_beats_schedule(inside, path):
    result = inside("mailroom-worker@mail", "mailroom", f"touch {path}")
    assert result.rc != 0
    assert "Read-only file system" in result.stderr


def test_beat_that_hangs_is_restarted(host, eventually):
    drop_in = "/run/systemd/system/mailroom-beat.service.d/test.conf"
    assert shown(host, "mailroom-beat", "Type") == "notify"
    assert shown(host, "mailroom-beat", "WatchdogUSec") == "2min"
    try:
        with host.sudo():
            # With the configured two minutes, the test would take too long.
            host.check_output(f"mkdir -p $(dirname {drop_in}) && printf '[Service]\\nWatchdogSec=4\\n' >{drop_in}")
            host.check_output("systemctl daemon-reload && systemctl restart mailroom-beat")
        before = shown(host, "mailroom-beat", "MainPID")
        time.sleep(8)
        assert shown(host, "mailroom-beat", "MainPID") == before  # beat has notified systemd
        with host.sudo():
            host.check_output(f"kill -STOP {before}")
        eventually(lambda: shown(host, "mailroom-beat", "MainPID") not in ("0", before), seconds=60)
        eventually(lambda: shown(host, "mailroom-beat", "ActiveState") == "active")
    finally:
        with host.sudo():
            host.check_output(f"rm -f {drop_in} && systemctl daemon-reload && systemctl restart mailroom-beat")
