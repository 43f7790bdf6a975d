"""Provokes failures of docs/incidents.md: the alert fires, the status shows the text of the page, and its command is the repair."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[3] / "docs/incidents.md").read_text()
# Per alert: the text in the status, and the first command.
ROWS = {
    alert: (shown, command)
    for alert, shown, command in re.findall(
        r"^\| \[(\w+)\]\([^)]*\) \| `([^`]+)` \| [^|]+ \|[^`]* `((?:systemctl|rabbitmqctl|mailroom-manage) [^`]+)`",
        PAGE,
        re.MULTILINE,
    )
}
SHELL = "mailroom-manage shell --verbosity 0 --command"
PUBLISH = (
    "from mailroom.celery import app; connection = app.connection_for_write(); "
    "connection.Producer().publish('malformed', exchange='emails', routing_key='mail.v1'); connection.close()"
)
# Per alert: the commands that provoke the failure.
FAILURES = {
    "ServiceDown": ["systemctl stop mailroom-beat"],
    "ServiceRestarts": ["for _ in 1 2 3 4 5; do systemctl kill --signal=KILL mailroom-beat; sleep 5; done"],
    "WebDown": ["systemctl stop mailroom-web.socket mailroom-web"],
    "RelayDown": ["systemctl stop mailroom-relay"],
    "WorkerMissing": ["systemctl stop mailroom-worker@mail"],
    "RabbitMQQueueWithoutConsumers": [
        f"{SHELL} \"from mailroom.celery import app; app.control.cancel_consumer('mail.v1', destination=['mail@site1'])\""
    ],
    "FlowerDown": ["systemctl stop mailroom-flower"],
    "RabbitMQNodeDown": ["systemctl stop rabbitmq-server"],
    "RabbitMQDiskAlarm": ["rabbitmqctl set_disk_free_limit 100TB"],
    "RabbitMQMemoryAlarm": ["rabbitmqctl set_vm_memory_high_watermark absolute 10MB"],
    "PostgreSQLDown": ["systemctl stop postgresql@17-main"],
    "EmailsFailed": [],
    "MessagesDeadLettered": [f'{SHELL} "{PUBLISH}"'],
}
# During these failures, the web service accepts no email.
REFUSES = {"WebDown", "PostgreSQLDown"}
# The alert ends long after the repair, because it looks back.
LOOKS_BACK = {"ServiceRestarts"}


@pytest.fixture(scope="module", autouse=True)
def alerts_fire_soon(host, run_playbook):
    """Alerts wait 10 s instead of some minutes. The playbook writes the rules again."""
    with host.sudo():
        host.check_output("sed -i 's/^\\( *for:\\) .*/\\1 10s/' /etc/prometheus/rules/*.yml && systemctl reload prometheus")
    yield
    done = run_playbook("playbooks/monitoring.yml", "--tags", "monitoring")
    assert done.returncode == 0 and "changed=0 " not in done.stdout, done.stdout


@pytest.fixture
def firing(query):
    return lambda alert: bool(query(f'ALERTS{{alertstate="firing",alertname="{alert}"}}'))


@pytest.fixture
def faults(status):
    def read():
        _, report, output = status()
        return [finding["text"] for finding in report["findings"]], output

    return read


def fail_an_email(on, post_email, call_api, eventually):
    """Posts an email whose deadline passes while no worker runs; returns its id."""
    on("site1", "systemctl stop mailroom-worker@mail")
    email = post_email(deadline=(datetime.now(UTC) + timedelta(seconds=5)).isoformat())
    eventually(lambda: call_api(f"emails/{email}")["state"] == "failed", seconds=90)
    on("site1", "systemctl start mailroom-worker@mail")
    return email


@pytest.mark.parametrize("alert", FAILURES)
def test_command_of_the_page_repairs_the_failure(alert, on, firing, faults, post_email, call_api, eventually):
    shown, command = ROWS[alert]
    eventually(lambda: not firing(alert), seconds=60)
    email = fail_an_email(on, post_email, call_api, eventually) if alert == "EmailsFailed" else None
    for provoke in FAILURES[alert]:
        on("site1", provoke)
    if not email and alert not in REFUSES:
        email = post_email()
    began = time.monotonic()
    try:
        eventually(lambda: firing(alert), seconds=180)
        print(f"{alert} fired after {time.monotonic() - began:.0f} s")
        found, output = faults()
        assert [text for text in found if shown in text], output
    finally:
        on("site1", command)
    if alert not in LOOKS_BACK:
        eventually(lambda: not firing(alert), seconds=120)
    if email:
        eventually(lambda: call_api(f"emails/{email}")["state"] == "sent", seconds=120)
    found, output = faults()
    assert [text for text in found if shown in text] == [], output


def test_the_page_says_which_failures_were_run():
    assert f"the first {len(FAILURES)} failures" in " ".join(PAGE.split())
    assert list(ROWS)[: len(FAILURES)] == list(FAILURES)
