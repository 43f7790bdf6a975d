"""Tests the whole environment with a cluster of brokers that was one broker before."""

from __future__ import annotations

import json

import pytest
import requests

BROKERS = ("mq1", "mq2", "mq3")


@pytest.fixture
def members(on):
    """Returns the online members of the queue mail.v1."""

    def ask(name):
        found = json.loads(on(name, "rabbitmqctl --quiet list_queues -p mailroom name online --formatter json"))
        return sorted(member for queue in found if queue["name"] == "mail.v1" for member in queue["online"])

    return ask


def test_queues_of_one_broker_have_members_on_the_new_nodes(members, eventually):
    eventually(lambda: members("mq1") == [f"rabbit@{name}" for name in BROKERS], seconds=60)


def test_email_arrives(send, inbox, eventually):
    subject, state = send()
    eventually(lambda: state() == "sent")
    assert inbox().count(subject) == 1


@pytest.mark.parametrize("lost", BROKERS)
def test_emails_arrive_while_a_broker_is_lost(send, inbox, eventually, on, members, lost):
    """Relay, workers and Flower connect to another broker."""
    before, state_before = send()
    on(lost, "systemctl kill --signal=KILL rabbitmq-server && systemctl stop rabbitmq-server")
    try:
        sent = [(before, state_before), *(send() for _ in range(5))]
        eventually(lambda: all(state() == "sent" for _, state in sent), seconds=60)
    finally:
        on(lost, "systemctl start rabbitmq-server")
    # A worker that lost its connection can send an email twice, but not lose it.
    assert all(inbox().count(subject) >= 1 for subject, _ in sent)
    eventually(lambda: len(members(lost)) == 3, seconds=120)


def test_worker_starts_while_a_broker_is_down(send, eventually, on, members):
    on("mq2", "systemctl stop rabbitmq-server")
    try:
        on("app1", "systemctl restart mailroom-worker@mail mailroom-relay")
        _, state = send()
        eventually(lambda: state() == "sent", seconds=60)
    finally:
        on("mq2", "systemctl start rabbitmq-server")
    eventually(lambda: len(members("mq2")) == 3, seconds=120)


def test_ports_between_nodes_are_closed_to_clients(on):
    connect = "import socket, sys; socket.create_connection(sys.argv[1:], timeout=3)"
    for source, port, is_open in (("app1", 5672, True), ("app1", 4369, False), ("app1", 25672, False), ("mq1", 25672, True)):
        done = on(source, f"python3 -c '{connect}' mq2 {port} 2>&1 || true")
        assert (done == "") is is_open, done


def test_flower_sees_the_workers(on, url, variables, eventually):
    account = ("flower", variables["secret_flower_password"])

    def names():
        requests.get(f"{url(5555)}/api/workers?refresh=1", auth=account, timeout=10).raise_for_status()
        return requests.get(f"{url(5555)}/api/workers", auth=account, timeout=10).json()

    eventually(lambda: {name.partition("@")[0] for name in names()} == {"mail", "maintenance"}, seconds=60)
