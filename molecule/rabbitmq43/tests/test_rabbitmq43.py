"""Tests the application on Debian testing's RabbitMQ 4.3 and Erlang 29: emails arrive, and deprecated features are denied."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import amqp
import pytest
import requests

PROJECT = Path(__file__).resolve().parents[3]
DENIED = {"amqp_address_v1", "amqp_filter_set_bug", "global_qos", "queue_master_locator", "transient_nonexcl_queues"}


@pytest.fixture
def connect(published, variables):
    connections = []

    def connection(user="mailroom", of="app"):
        password = variables[f"secret_rabbitmq_{of}_password"]
        found = amqp.Connection(f"127.0.0.1:{published(5672)}", user, password, virtual_host="mailroom", connect_timeout=10)
        found.connect()
        connections.append(found)
        return found

    yield connection
    for each in connections:
        each.collect()


def test_versions_are_those_of_debian_testing(api):
    found = api("overview")
    assert found["rabbitmq_version"].startswith("4.3.")
    assert found["erlang_version"].startswith("29.")


def test_email_arrives(site, inbox, variables, eventually):
    headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}
    subject = f"test {uuid.uuid4()}"
    email = {"subject": subject, "text": "Hello.", "to": ["one@example.net", "two@example.net"]}
    answer = requests.post(f"{site}/api/emails", json=email, headers=headers, timeout=5)
    assert answer.status_code == 202, answer.text
    status = f"{site}/api/emails/{answer.json()['id']}"
    eventually(lambda: requests.get(status, headers=headers, timeout=5).json()["state"] == "sent", seconds=60)
    assert inbox().count(subject) == 2


def test_workers_and_flower_use_no_deprecated_feature(api, host):
    queues = {queue["name"]: queue for queue in api("queues/mailroom")}
    assert queues["mail.v1"]["type"] == "quorum"
    assert [name for name in queues if name.endswith("celery.pidbox")]
    with host.sudo():
        host.check_output("rabbitmq-diagnostics --quiet check_if_any_deprecated_features_are_used")


def test_denied_features_are_denied(connect, host):
    with host.sudo():
        settings = host.check_output("cat /etc/rabbitmq/rabbitmq.conf")
    assert {feature for feature in DENIED if f"deprecated_features.permit.{feature} = false" in settings} == DENIED
    with pytest.raises(amqp.exceptions.AMQPError, match="transient_nonexcl_queues"):
        connect().channel().queue_declare("celeryev.test", durable=False, exclusive=False, auto_delete=True)


def test_channel_prefetch_applies_to_each_consumer(connect):
    """global_qos is denied, so the prefetch limit applies per consumer, and both consumers on the channel get a message."""
    # The application's user is not permitted to publish to the default exchange.
    channel = connect("admin", "administrator").channel()
    channel.queue_declare("mail.qos", durable=True, auto_delete=False, arguments={"x-queue-type": "classic"})
    channel.basic_qos(0, 1, True)
    received = []
    for tag in ("a", "b"):
        channel.basic_consume("mail.qos", consumer_tag=tag, callback=received.append)
    for number in range(4):
        channel.basic_publish(amqp.Message(str(number)), routing_key="mail.qos")
    with pytest.raises(TimeoutError):
        while True:
            channel.connection.drain_events(timeout=3)
    channel.queue_delete("mail.qos")
    assert len(received) == 2


def test_stable_feature_flags_are_enabled_and_no_setting_is_ineffective(api, host):
    flags = api("feature-flags")
    assert [flag["name"] for flag in flags if flag["stability"] in ("stable", "required") and flag["state"] != "enabled"] == []
    with host.sudo():
        assert "cluster_partition_handling" not in host.check_output("cat /etc/rabbitmq/rabbitmq.conf")


def test_unsupported_erlang_causes_a_warning():
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "playbooks/validate.yml"],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: RabbitMQ 4.3 on Erlang 29 is shipped by a distribution" in " ".join(done.stdout.split())
