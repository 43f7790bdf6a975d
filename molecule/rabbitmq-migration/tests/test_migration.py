"""Migrates a broker from Debian 12's RabbitMQ 3.10 to Debian 13's 4.0. Each test continues with the result of the previous one."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import amqp
import pytest

QUEUES = {"orders.classic": 600, "orders.quorum": 400}
# apt must not ask questions, and must keep the files that the role wrote.
UPGRADE = """
set -e
export DEBIAN_FRONTEND=noninteractive
sed -i s/bookworm/trixie/g /etc/apt/sources.list.d/debian.sources
apt-get -qq update
apt-get -qq -o Dpkg::Options::=--force-confold dist-upgrade --yes
"""


@pytest.fixture
def connect(published):
    connections = []

    def connection():
        found = amqp.Connection(f"127.0.0.1:{published(5672)}", "old", "old-password", virtual_host="shop", connect_timeout=30)
        found.connect()
        connections.append(found)
        return found

    yield connection
    for each in connections:
        each.collect()


@pytest.fixture(scope="module")
def backups(tmp_path_factory):
    return tmp_path_factory.mktemp("backups")


@pytest.fixture
def migrate(run_playbook, backups):
    def run(**variables):
        done = run_playbook("playbooks/ops/migrate_rabbitmq.yml", backup_directory=str(backups), **variables)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


@pytest.fixture
def site(run_playbook):
    def run(*arguments, **variables):
        done = run_playbook("playbooks/broker.yml", *arguments, **variables)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


def messages(root):
    found = json.loads(root("rabbitmqctl --quiet list_queues --vhost shop --formatter json name messages"))
    return {queue["name"]: queue["messages"] for queue in found}


@pytest.fixture
def root(host):
    def run(command):
        with host.sudo():
            return host.check_output(command)

    return run


PACKAGES = "dpkg-query --show --showformat '${Package} ${Version}\n' rabbitmq-server erlang-base; ls /etc/apt/preferences.d"


def test_upgrade_from_310_is_refused_before_a_change(site, root, connect, eventually):
    channel = connect().channel()
    channel.confirm_select()
    for queue, number in QUEUES.items():
        for _ in range(number):
            channel.basic_publish_confirm(amqp.Message("x", delivery_mode=2), "orders", queue.partition(".")[2])
    eventually(lambda: messages(root) == QUEUES)
    before = root(PACKAGES)
    code, output = site()
    assert code != 0
    assert "RabbitMQ 3.10.8 is installed, and rabbitmq_version is 4.0, which can read the data of 3.13, 4.0 only." in output
    assert "migrate_rabbitmq.yml" in output
    assert root(PACKAGES) == before


def test_messages_that_would_be_lost_are_named_and_stay(migrate, root, connect):
    code, output = migrate()
    assert code != 0
    assert "1000 messages would be lost: 600 in orders.classic of shop, 400 in orders.quorum of shop." in output
    assert "add -e confirm=yes" in output
    assert messages(root) == QUEUES
    # The publishers are no longer blocked.
    channel = connect().channel()
    channel.confirm_select()
    channel.basic_publish_confirm(amqp.Message("x", delivery_mode=2), "orders", "quorum", confirm_timeout=10)


def test_consumers_receive_messages_while_publishers_are_blocked(migrate, root, connect, backups):
    """A consumer empties one queue. The messages of the other queue are lost after the confirmation."""
    connection = connect()
    channel = connection.channel()
    channel.basic_qos(0, 50, False)
    received = []

    def receive(message):
        received.append(message)
        channel.basic_ack(message.delivery_tag)

    channel.basic_consume("orders.classic", callback=receive)
    until = time.monotonic() + 60
    while len(received) < QUEUES["orders.classic"] and time.monotonic() < until:
        connection.drain_events(timeout=10)
    connection.close()
    assert len(received) == QUEUES["orders.classic"]
    code, output = migrate(confirm="yes")
    assert code == 0, output
    assert "401 messages would be lost: 401 in orders.quorum of shop." in output
    assert root("systemctl is-active rabbitmq-server || true").strip() == "inactive"
    export = backups / "migration.json"
    assert export.stat().st_mode & 0o777 == 0o600
    hashes = [user["password_hash"] for user in json.loads(export.read_text())["users"]]
    assert len(hashes) == 2
    assert [each for each in hashes if each in output] == []


def test_next_step_is_said_if_the_package_is_still_old(migrate):
    code, output = migrate(confirm="yes")
    assert code != 0
    assert "the broker is stopped. Install RabbitMQ 4.0, on Debian with a distribution upgrade" in output


def test_old_data_is_recognised_after_the_upgrade(root, site, migrate):
    root(UPGRADE)
    assert re.search(r"rabbitmq-server 4\.0\.", root(PACKAGES))
    code, output = site()
    assert code != 0
    assert "RabbitMQ 4.0.5 does not start with it, because it lacks the required feature flags" in output
    assert "migrate_rabbitmq.yml" in output
    code, output = migrate()
    assert code != 0
    assert "RabbitMQ 4.0.5 can't read the data in /var/lib/rabbitmq/mnesia." in output
    assert "add -e confirm=yes" in output
    assert [name for name in root("ls /var/lib/rabbitmq").split() if name.startswith("mnesia")] == ["mnesia"]


def test_new_broker_has_the_definitions_and_the_old_data_is_kept(migrate, root, api, connect, backups, site):
    before = root("stat --format '%U:%G %a' /var/lib/rabbitmq/mnesia && ls /var/lib/rabbitmq/mnesia | sort")
    code, output = migrate(rabbitmq_migration_confirmed=True)
    assert code == 0, output
    assert "policies mirrored in shop" in output
    assert api("overview")["rabbitmq_version"].startswith("4.0.")
    # A queue without a type gets the node's default type. If a client declares the queue without a type, RabbitMQ uses the same
    # default.
    assert {queue["name"]: queue["type"] for queue in api("queues/shop")} == dict.fromkeys(QUEUES, "quorum")
    connect().channel().queue_declare("orders.classic", durable=True, auto_delete=False)
    policies = [policy["definition"] for policy in api("policies/shop")]
    assert policies == [{"max-length": 50000}]
    names = {user["name"] for user in api("users")}
    assert {"admin", "old"} <= names
    assert "guest" not in names
    channel = connect().channel()
    channel.confirm_select()
    channel.basic_publish_confirm(amqp.Message("x", delivery_mode=2), "orders", "classic", confirm_timeout=10)
    assert channel.basic_get("orders.classic", no_ack=True)
    (aside,) = [name for name in root("ls /var/lib/rabbitmq").split() if name.startswith("mnesia-")]
    after = root(f"stat --format '%U:%G %a' /var/lib/rabbitmq/{aside} && ls /var/lib/rabbitmq/{aside} | sort")
    assert after == before
    assert sorted(path.name for path in Path(backups).iterdir()) == ["migrated.json"]
    code, output = site()
    assert code == 0, output
    assert " changed=0 " in output
    code, output = migrate(confirm="yes")
    assert code != 0
    assert "needs no migration" in output


def test_required_flags_are_those_of_the_broker(api):
    table = Path(__file__).resolve().parents[3] / "roles/rabbitmq/vars/main/compatibility.yml"
    listed = set(re.findall(r"^    - (\w+)$", table.read_text(), re.MULTILINE))
    older = """classic_mirrored_queue_version implicit_default_bindings maintenance_mode_status quorum_queue stream_queue
    user_limits virtual_host_metadata drop_unroutable_metric empty_basic_get_metric"""
    assert {flag["name"] for flag in api("feature-flags") if flag["stability"] == "required"} - set(older.split()) == listed


def test_downgrade_is_refused(site, root):
    before = root(PACKAGES)
    code, output = site(rabbitmq_version="4.0.4")
    assert code != 0
    assert "RabbitMQ 4.0.5 is installed, and rabbitmq_version is 4.0.4. An older RabbitMQ can't read the data" in output
    assert root(PACKAGES) == before


def test_upgrade_during_an_alarm_is_refused(site, root):
    before = root(PACKAGES)
    root("rabbitmqctl --quiet set_vm_memory_high_watermark 0")
    code, output = site(rabbitmq_version="4.1.0")
    root("rabbitmqctl --quiet set_vm_memory_high_watermark 0.6")
    assert code != 0
    assert "The node rabbit@mq1 has a memory alarm. Nothing was changed." in output
    assert root(PACKAGES) == before


def test_upgrade_without_a_running_broker_is_refused(site, root):
    root("systemctl stop rabbitmq-server")
    code, output = site(rabbitmq_version="4.1.0")
    root("systemctl start rabbitmq-server")
    assert code != 0
    assert "The broker must run before its upgrade" in output


# Debian has only one release of RabbitMQ 4.0. Its package with a higher version, in a local source, simulates the next release.
NEXT_RELEASE = """
set -e
cd /var/tmp && mkdir -p next source
apt-get -qq download rabbitmq-server
dpkg-deb --raw-extract rabbitmq-server_*.deb next && rm rabbitmq-server_*.deb
sed -i -E 's/^Version: .*$/Version: 4.0.99-1/' next/DEBIAN/control
dpkg-deb --build next source/rabbitmq-server.deb > /dev/null
{ cat next/DEBIAN/control; echo Filename: ./rabbitmq-server.deb; echo Size: $(stat --format %s source/rabbitmq-server.deb)
  echo SHA256: $(sha256sum source/rabbitmq-server.deb | cut -d' ' -f1); } > source/Packages
echo 'deb [trusted=yes] file:/var/tmp/source ./' > /etc/apt/sources.list.d/next.list
apt-get -qq update
"""


def test_healthy_broker_is_upgraded_and_keeps_its_messages(run_playbook, root, connect, backups, api):
    channel = connect().channel()
    channel.confirm_select()
    channel.basic_publish_confirm(amqp.Message("kept", delivery_mode=2), "orders", "quorum", confirm_timeout=10)
    root(NEXT_RELEASE)
    playbook = "playbooks/ops/upgrade_rabbitmq.yml"
    done = run_playbook(playbook, backup_directory=str(backups), rabbitmq_version="4.0.99")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rabbitmq-server 4.0.99-1" in root(PACKAGES)
    assert (backups / "definitions.json").exists()
    message = connect().channel().basic_get("orders.quorum", no_ack=True)
    assert message.body == "kept"
    assert [flag["name"] for flag in api("feature-flags") if flag["stability"] == "stable" and flag["state"] != "enabled"] == []
