"""Causes the failures in docs/incidents.md, after the tests of a healthy environment.

The alert fires, the status shows the page's text, and the page's command repairs the failure.
"""

from __future__ import annotations

import re
import time
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
# Publishes a message that is no Celery task to the worker's queue, as the broker's user of the web service.
MALFORMED = """
set -a && . /opt/mailroom/current/environment && . /opt/mailroom/current/environment.web && set +a
cd /opt/mailroom/current && venv/bin/python -c '
from mailroom.celery import app
with app.connection_for_write() as connection:
    connection.Producer().publish("no task", routing_key="mail.v1", delivery_mode=2)
'
"""
# Per alert: the command that causes the failure.
FAILURES = {
    "ServiceDown": "systemctl stop mailroom-beat",
    "ServiceRestarts": "for _ in 1 2 3 4 5; do systemctl kill --signal=KILL mailroom-beat; sleep 5; done",
    "WebDown": "systemctl stop mailroom-web.socket mailroom-web",
    "RelayDown": "systemctl stop mailroom-relay",
    "WorkerMissing": "systemctl stop mailroom-worker@mail",
    "FlowerDown": "systemctl stop mailroom-flower",
    "RabbitMQNodeDown": "systemctl stop rabbitmq-server",
    # The limit rises instead of the space that is used, so that the test does not fill the machine's disk.
    "RabbitMQDiskAlarm": "rabbitmqctl set_disk_free_limit mem_relative 100",
    "RabbitMQMemoryAlarm": "rabbitmqctl set_vm_memory_high_watermark absolute 1MB",
    "PostgreSQLDown": "systemctl stop postgresql@17-main",
    "MessagesDeadLettered": MALFORMED,
    "RabbitMQQueueWithoutConsumers": "systemctl stop mailroom-worker@mail",
}
# During these failures, the web service accepts no email.
REFUSES = {"WebDown", "PostgreSQLDown"}
# The alert ends long after the repair, because its expression covers the last minutes.
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
        _, report, _ = status()
        return [finding["text"] for finding in report["findings"]]

    return read


@pytest.mark.parametrize("alert", FAILURES)
def test_command_of_the_page_repairs_the_failure(alert, on, firing, faults, post_email, call_api, eventually):
    shown, command = ROWS[alert]
    eventually(lambda: not firing(alert), seconds=60)
    on("site1", FAILURES[alert])
    email = None if alert in REFUSES else post_email()
    began = time.monotonic()
    try:
        eventually(lambda: firing(alert), seconds=180)
        print(f"{alert} fired after {time.monotonic() - began:.0f} s")
        assert [text for text in faults() if shown in text]
    finally:
        on("site1", command)
    if alert not in LOOKS_BACK:
        eventually(lambda: not firing(alert), seconds=120)
    if email:
        eventually(lambda: call_api(f"emails/{email}")["state"] == "sent", seconds=120)
    assert [text for text in faults() if shown in text] == []


def test_the_page_says_which_failures_were_run():
    assert f"the first {len(FAILURES)} failures" in " ".join(PAGE.split())
    assert list(ROWS)[: len(FAILURES)] == list(FAILURES)
