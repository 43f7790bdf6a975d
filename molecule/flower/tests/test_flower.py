"""Tests Flower from the role flower: login, permissions, and the events that Flower receives."""

from __future__ import annotations

import time
import uuid

import pytest
import requests
from kombu import Connection, Exchange


@pytest.fixture(scope="module")
def site(url):
    return url(5555)


@pytest.fixture(scope="module")
def login(variables):
    return ("flower", variables["secret_flower_password"])


@pytest.mark.parametrize("path", ["/workers", "/tasks", "/api/workers", "/api/tasks"])
def test_anonymous_user_is_refused(site, path):
    assert requests.get(f"{site}{path}", timeout=10).status_code == 401


def test_wrong_password_is_refused(site):
    assert requests.get(f"{site}/workers", auth=("flower", "wrong"), timeout=10).status_code == 401


def test_login_is_accepted(site, login):
    page = requests.get(f"{site}/workers", auth=login, timeout=10)
    assert page.status_code == 200
    assert "Flower" in page.text


def test_workers_cannot_be_shut_down(site, login):
    answer = requests.post(f"{site}/api/worker/shutdown/mail@elsewhere", auth=login, timeout=10)
    assert answer.status_code == 403


def test_worker_event_is_counted(site, published, variables, eventually):
    """The counter proves that Flower consumes events. /healthcheck responds even if Flower can't consume events."""
    password = variables["secret_rabbitmq_worker_password"]
    celeryev = Exchange("celeryev", "topic")
    event = {"hostname": "test@elsewhere", "utcoffset": 0, "pid": 1, "clock": 1, "timestamp": time.time()}
    task = {"uuid": str(uuid.uuid4()), "name": "tests.probe", "args": "()", "kwargs": "{}", "retries": 0}
    with Connection(f"amqp://mailroom-worker:{password}@127.0.0.1:{published(5672)}/mailroom") as connection:
        connection.Producer(exchange=celeryev, serializer="json").publish(
            {"type": "task-received", **event, **task}, routing_key="task.received", declare=[celeryev]
        )
    eventually(
        lambda: (
            'flower_events_total{task="tests.probe",type="task-received",worker="test@elsewhere"} 1.0'
            in requests.get(f"{site}/metrics", timeout=10).text
        )
    )


def test_secrets_are_not_visible(host, variables):
    assert host.run("cat /etc/mailroom/flower.environment").rc != 0
    with host.sudo():
        seen = host.check_output("systemctl cat mailroom-flower; ps -e -o args; journalctl --no-pager")
    for name in ("secret_flower_password", "secret_flower_cookie", "secret_rabbitmq_flower_password"):
        assert variables[name] not in seen, name


def test_killed_flower_comes_back(host, site, eventually):
    with host.sudo():
        host.check_output("systemctl kill --signal=KILL mailroom-flower")
    eventually(lambda: requests.get(f"{site}/workers", timeout=5).status_code == 401)
