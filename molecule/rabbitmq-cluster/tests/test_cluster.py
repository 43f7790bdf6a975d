"""Tests a cluster of three brokers: its queues, the loss of a node, and stops that wait for other nodes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import amqp
import pytest
import requests
import testinfra
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError

PROJECT = Path(__file__).resolve().parents[3]

BROKERS = ("mq1", "mq2", "mq3")
NODES = [f"rabbit@node-{name}.queues" for name in BROKERS]


@pytest.fixture(scope="module")
def hosts():
    return {name: testinfra.get_host(f"ansible://{name}") for name in BROKERS}


@pytest.fixture(scope="module")
def port(hosts):
    """Returns the loopback port on which a port of a broker is published."""
    return lambda name, port: hosts[name].ansible.get_variables()["testbed_published"][str(port)]


@pytest.fixture(scope="module")
def authority(variables, tmp_path_factory):
    """A file with the environment's certificate authority."""
    file = tmp_path_factory.mktemp("tls") / "ca.pem"
    file.write_text(variables["secret_certificate_authority"].partition("-----BEGIN P")[0])
    return str(file)


@pytest.fixture(scope="module")
def ask(port, variables, authority):
    """Calls the management API of a broker."""

    def get(name, path):
        url = f"https://127.0.0.1:{port(name, 15671)}/api/{path}"
        account = ("admin", variables["secret_rabbitmq_administrator_password"])
        response = requests.get(url, auth=account, timeout=30, verify=authority)
        response.raise_for_status()
        return response.json()

    return get


@pytest.fixture(scope="module")
def run():
    """Runs a playbook on all brokers with extra variables; returns the finished process."""

    def playbook(path, *arguments, **variables):
        return subprocess.run(
            [Path(sys.executable).parent / "ansible-playbook", path, "--extra-vars", json.dumps(variables), *arguments],
            cwd=PROJECT,
            env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"},
            capture_output=True,
            text=True,
            check=False,
        )

    return playbook


@pytest.fixture
def connect(port, variables, authority):
    """Connects over AMQP to the first of the named brokers that responds, as the application does."""
    connections = []

    def connection(*names):
        account = f"mailroom:{variables['secret_rabbitmq_app_password']}"
        urls = ";".join(f"amqps://{account}@127.0.0.1:{port(name, 5671)}/mailroom" for name in names)
        # On this machine, the address of each broker is 127.0.0.1.
        tls = {"ca_certs": authority, "server_hostname": "127.0.0.1"}
        connections.append(Connection(urls, ssl=tls, connect_timeout=4, transport_options={"max_retries": 4, "interval_start": 0}))
        connections[-1].ensure_connection(max_retries=4)
        return connections[-1]

    yield connection
    for connection in connections:
        connection.release()


@pytest.fixture
def queue(connect):
    """A quorum queue for one test."""
    channel = connect(*BROKERS).channel()
    made = Queue("mail.test", Exchange("emails", "topic"), "mail.test", channel=channel, queue_arguments={"x-queue-type": "quorum"})
    made.declare()
    yield made
    Queue("mail.test", channel=connect(*BROKERS).channel()).delete()


def publish(connection, text):
    channel = connection.channel()
    channel.confirm_select()
    channel.basic_publish_confirm(amqp.Message(text), exchange="emails", routing_key="mail.test")


def said(host, since):
    """The log entries of the broker's unit since a time of the host's clock."""
    return host.check_output(f"journalctl --no-pager --since=@{since} --identifier=rabbitmq-server")


def running(ask, name):
    return sorted(node["name"] for node in ask(name, "nodes?columns=name,running") if node["running"])


@pytest.fixture
def whole(ask, eventually):
    """Waits until all nodes run in the cluster."""
    return lambda: eventually(lambda: all(running(ask, name) == NODES for name in BROKERS), seconds=120)


def test_nodes_form_one_cluster(ask):
    for name in BROKERS:
        assert running(ask, name) == NODES


def test_names_are_resolved_without_dns(hosts):
    """The names exist only in the file that the role writes for Erlang."""
    assert hosts["mq1"].run("getent ahosts node-mq2.queues").rc != 0


def test_quorum_queue_has_a_member_on_each_node(ask, queue):
    assert sorted(ask("mq2", f"queues/mailroom/{queue.name}")["members"]) == NODES


def test_definitions_exist_once_for_all_nodes(ask):
    for name in BROKERS:
        assert sorted(user["name"] for user in ask(name, "users")) == ["admin", "mailroom", "mailroom-flower"]


@pytest.mark.parametrize("lost", BROKERS)
def test_clients_continue_without_a_killed_node(hosts, connect, queue, lost, whole, eventually, ask):
    """Messages from before and during the loss of a node are delivered."""
    publish(connect(*BROKERS), f"before {lost}")
    broker = hosts[lost]
    with broker.sudo():
        broker.check_output("systemctl kill --signal=KILL rabbitmq-server && systemctl stop rabbitmq-server")
        assert not broker.service("rabbitmq-server").is_running
    try:
        others = [name for name in BROKERS if name != lost]
        eventually(lambda: len(running(ask, others[0])) == 2, seconds=60)
        # The killed node is the first in the list.
        connection = connect(lost, *others)
        publish(connection, f"without {lost}")
        channel = connection.channel()
        got = []
        while message := channel.basic_get(queue.name):
            got.append(message.body)
            channel.basic_ack(message.delivery_tag)
        assert [each if isinstance(each, str) else each.decode() for each in got] == [f"before {lost}", f"without {lost}"]
    finally:
        with broker.sudo():
            broker.check_output("systemctl start rabbitmq-server")
    whole()


def test_stop_waits_while_queues_need_the_node(hosts, queue, whole, ask, eventually):
    """With one node down, another node stops only after rabbitmq_stop_wait, and logs the reason."""
    first, second = hosts["mq2"], hosts["mq3"]
    with first.sudo():
        first.check_output("systemctl stop rabbitmq-server")
    try:
        eventually(lambda: len(running(ask, "mq3")) == 2, seconds=60)
        with second.sudo():
            since = second.check_output("date +%s")
            second.check_output("systemctl stop --no-block rabbitmq-server")
            # This is half of rabbitmq_stop_wait.
            assert second.run("timeout 10 sh -c 'while pidof beam.smp >/dev/null; do sleep 1; done'").rc == 124
            with first.sudo():
                first.check_output("systemctl start rabbitmq-server")
            # The other node is back, so the stop ends before its limit.
            eventually(lambda: not second.service("rabbitmq-server").is_running, seconds=15)
            assert "may lose their majority" not in said(second, since)
    finally:
        for host in (first, second):
            with host.sudo():
                host.check_output("systemctl start rabbitmq-server")
    whole()


def test_stop_ends_at_its_limit(hosts, queue, whole, ask, eventually):
    first, second = hosts["mq2"], hosts["mq3"]
    with first.sudo():
        first.check_output("systemctl stop rabbitmq-server")
    try:
        eventually(lambda: len(running(ask, "mq3")) == 2, seconds=60)
        with second.sudo():
            since = second.check_output("date +%s")
            second.check_output("timeout 60 systemctl stop rabbitmq-server")
            assert "may lose their majority" in said(second, since)
    finally:
        for host in (first, second):
            with host.sudo():
                host.check_output("systemctl start rabbitmq-server")
    whole()


def test_changed_cookie_and_settings_reach_all_nodes_without_an_outage(hosts, queue, connect, whole, run, variables):
    """The playbook restarts the nodes one after another.

    Meanwhile, a client publishes messages. If it can't publish a message, it tries again.
    """
    published, stop = [], threading.Event()

    def publish_all_the_time():
        connection = None
        while not stop.is_set():
            text = f"message {len(published)}"
            try:
                connection = connection or connect(*BROKERS)
                publish(connection, text)
            except (OSError, amqp.exceptions.AMQPError, OperationalError):
                connection = None
                time.sleep(0.2)
            else:
                published.append((time.monotonic(), text))
                time.sleep(0.1)

    thread = threading.Thread(target=publish_all_the_time)
    thread.start()
    try:
        done = run("playbooks/broker.yml", secret_rabbitmq_erlang_cookie="Changed" * 5, rabbitmq_settings={"channel_max": 100})
    finally:
        stop.set()
        thread.join()
    assert done.returncode == 0, done.stdout + done.stderr
    whole()
    for host in hosts.values():
        with host.sudo():
            assert host.check_output("cat /var/lib/rabbitmq/.erlang.cookie") == "Changed" * 5
            assert "channel_max,100" in host.check_output("rabbitmqctl --quiet environment").replace(" ", "")
    times = [moment for moment, _ in published]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 30
    channel = connect(*BROKERS).channel()
    got = set()
    while message := channel.basic_get(queue.name):
        got.add(message.body if isinstance(message.body, str) else message.body.decode())
        channel.basic_ack(message.delivery_tag)
    assert {text for _, text in published} <= got


def test_cookie_is_not_changed_on_a_part_of_the_cluster(run):
    done = run("playbooks/broker.yml", "--limit", "mq1", secret_rabbitmq_erlang_cookie="Other" * 5)
    assert done.returncode == 2
    assert "All nodes of the cluster must change it in the same run" in done.stdout


def test_lost_node_is_replaced_by_a_new_host(hosts, queue, connect, run, whole, ask, eventually):
    publish(connect(*BROKERS), "kept")
    lost = hosts["mq3"]
    with lost.sudo():
        refused = run("playbooks/ops/remove_broker_node.yml", rabbitmq_removed_node="node-mq3.queues")
        assert "allowed: a node of the cluster that is not running" in refused.stdout
        lost.check_output("systemctl kill --signal=KILL rabbitmq-server && systemctl stop rabbitmq-server")
        # The new host has the same name and no data.
        lost.check_output("rm -r /var/lib/rabbitmq/mnesia")
    eventually(lambda: len(running(ask, "mq1")) == 2, seconds=60)
    done = run("playbooks/ops/remove_broker_node.yml", rabbitmq_removed_node="node-mq3.queues")
    assert done.returncode == 0, done.stdout + done.stderr
    eventually(lambda: len(ask("mq1", f"queues/mailroom/{queue.name}")["members"]) == 2, seconds=15)
    # The other nodes restart because of a changed setting. They can restart only when the new node has joined.
    others = [hosts["mq1"], hosts["mq2"]]
    since = [host.check_output("date +%s") for host in others]
    done = run("playbooks/broker.yml", rabbitmq_settings={"channel_max": 99}, rabbitmq_stop_wait=120)
    assert done.returncode == 0, done.stdout + done.stderr
    whole()
    for host, moment in zip(others, since, strict=True):
        with host.sudo():
            assert "channel_max,99" in host.check_output("rabbitmqctl --quiet environment").replace(" ", "")
            assert "may lose their majority" not in said(host, moment)
    eventually(lambda: sorted(ask("mq1", f"queues/mailroom/{queue.name}")["members"]) == NODES, seconds=60)
    message = connect("mq3").channel().basic_get(queue.name)
    assert message is not None


def test_data_of_a_node_with_another_name_is_refused(hosts, run):
    """After a change of its name, a node would start without its queues."""
    done = run("playbooks/broker.yml", "--limit", "mq1", rabbitmq_node_name="node-mq2.queues")
    assert done.returncode == 2
    assert "has the data of rabbit@node-mq1.queues, but its name in rabbitmq_nodes is node-mq2.queues" in done.stdout
