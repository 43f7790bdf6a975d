"""Tests the broker that the role rabbitmq installs: logins, permissions, and state after a restart."""

from __future__ import annotations

import re
import socket
import time

import amqp
import pytest
import requests
from kombu import Connection, Exchange, Queue

VHOST = "mailroom"


@pytest.fixture
def connect(published, variables):
    """Connects over AMQP; by default as the application's user to its virtual host."""
    connections = []

    def connection(user="mailroom", password=None, vhost=VHOST):
        password = password or variables["secret_rabbitmq_app_password"]
        url = f"amqp://{user}:{password}@127.0.0.1:{published(5672)}/{vhost}"
        connections.append(Connection(url, connect_timeout=10, transport_options={"max_retries": 1}))
        connections[-1].connect()
        return connections[-1]

    yield connection
    for connection in connections:
        connection.release()


def quorum_queue(name, channel):
    return Queue(name, Exchange("emails", "topic"), name, channel=channel, queue_arguments={"x-queue-type": "quorum"})


def test_app_user_publishes_and_consumes(connect):
    channel = connect().channel()
    queue = quorum_queue("mail.test", channel)
    queue.declare()
    producer_channel = connect().channel()
    producer_channel.confirm_select()
    producer_channel.basic_publish_confirm(amqp.Message("hello"), exchange="emails", routing_key="mail.test")
    message = queue.get()
    assert message is not None
    assert message.body in ("hello", b"hello")
    message.ack()
    queue.delete()


@pytest.mark.parametrize("name", ["orders", "mailx", "hotmail.v1"])
def test_app_user_cannot_declare_foreign_names(connect, name):
    with pytest.raises(amqp.exceptions.AccessRefused, match=f"configure access to queue '{name}'"):
        quorum_queue(name, connect().channel()).declare()


def test_app_user_cannot_access_other_virtual_hosts(connect):
    with pytest.raises((amqp.exceptions.NotAllowed, amqp.exceptions.NotFound)):
        connect(vhost="/")


def test_app_user_cannot_use_the_management_api(api, variables):
    with pytest.raises(requests.HTTPError, match="401"):
        api("overview", auth=("mailroom", variables["secret_rabbitmq_app_password"]))


def test_guest_does_not_exist(api, connect):
    assert "guest" not in [user["name"] for user in api("users")]
    with pytest.raises(amqp.exceptions.AccessRefused):
        connect(user="guest", password="guest", vhost=VHOST)  # noqa: S106 - the well-known one


def test_guest_was_never_created(host):
    """The broker created only the administrator. This shows that the package did not start it before it was configured."""
    with host.sudo():
        log = host.check_output("cat /var/log/rabbitmq/rabbit@*.log").partition("Time to start RabbitMQ")[0]
    assert "Created user 'admin'" in log
    assert "Created user 'guest'" not in log
    assert "Successfully set permissions for user 'guest'" not in log


def test_flower_user_lists_queues_but_cannot_read_them(api, connect, variables):
    password = variables["secret_rabbitmq_flower_password"]
    assert isinstance(api(f"queues/{VHOST}", auth=("mailroom-flower", password)), list)
    quorum_queue("mail.test", connect().channel()).declare()
    channel = connect(user="mailroom-flower", password=password).channel()
    with pytest.raises(amqp.exceptions.AccessRefused):
        channel.basic_get("mail.test")
    quorum_queue("mail.test", connect().channel()).delete()


def test_policy_applies_to_mail_queues(api, connect, eventually):
    queue = quorum_queue("mail.v0", connect().channel())
    queue.declare()
    found = eventually(lambda: api(f"queues/{VHOST}/mail.v0").get("effective_policy_definition"))
    queue.delete()
    assert found["overflow"] == "reject-publish"
    assert found["delivery-limit"] == 8


def test_queues_are_quorum_queues_by_default(api, connect):
    channel = connect().channel()
    channel.queue_declare("mail.default", durable=True, auto_delete=False)
    assert api(f"queues/{VHOST}/mail.default")["type"] == "quorum"
    channel.queue_delete("mail.default")


def test_transient_nonexclusive_queues_are_denied(connect):
    """The role denies such queues on all versions, as RabbitMQ 4.3 does by default."""
    with pytest.raises(amqp.exceptions.AMQPError, match="transient_nonexcl_queues"):
        connect().channel().queue_declare("celeryev.test", durable=False, exclusive=False, auto_delete=True)


def test_broker_has_the_configured_limits(host, variables):
    with host.sudo():
        pid = host.check_output("systemctl show --property MainPID --value rabbitmq-server")
        limits = host.check_output(f"cat /proc/{pid}/limits")
        ceiling = int(host.check_output("awk '/open files/ {print $5}' /proc/1/limits"))
    running = int(next(line for line in limits.splitlines() if "open files" in line).split()[4])
    # If the container's hard limit is lower than the unit's, systemd silently uses the container's.
    assert running == min(variables["rabbitmq_open_files"], ceiling)


def test_only_the_broker_can_read_secrets(host, variables):
    for path in ("/var/lib/rabbitmq/.erlang.cookie", "/etc/rabbitmq/definitions.json", "/etc/rabbitmq/rabbitmq.conf"):
        result = host.run(f"cat {path}")
        assert result.rc != 0 and "Permission denied" in result.stderr, path
    with host.sudo():
        arguments = host.check_output("ps -e -o args")
    assert variables["secret_rabbitmq_erlang_cookie"] not in arguments


def test_killed_broker_restarts_with_its_messages(host, connect, published, eventually):
    queue = quorum_queue("mail.kept", connect().channel())
    queue.declare()
    channel = connect().channel()
    channel.confirm_select()
    channel.basic_publish_confirm(amqp.Message("kept", delivery_mode=2), exchange="emails", routing_key="mail.kept")
    # RabbitMQ writes its list of quorum queues twice per second. A queue that was declared within the last half second before a
    # kill -9 is empty afterwards (seen on 4.0.5). The role can't change this, and the email's row in the database remains.
    time.sleep(2)
    with host.sudo():
        before = host.check_output("systemctl show --property MainPID --value rabbitmq-server")
        host.check_output(f"kill -KILL {before}")

    def answers():
        with host.sudo():
            pid = host.check_output("systemctl show --property MainPID --value rabbitmq-server")
        socket.create_connection(("127.0.0.1", published(5672)), timeout=2).close()
        return pid not in ("0", before)

    eventually(answers, seconds=60)

    def message_is_there():
        try:
            return Queue("mail.kept", channel=connect().channel()).get()
        except (amqp.exceptions.AMQPError, OSError) as error:
            raise AssertionError(error) from error

    message = eventually(message_is_there, seconds=60)
    assert message.body in ("kept", b"kept")
    message.ack()
    quorum_queue("mail.kept", connect().channel()).delete()


def test_manual_changes_to_files_are_repaired(host, run_playbook):
    def files():
        return sorted(host.check_output("cd /etc/rabbitmq && stat -c '%n %U %G %a' * && sha256sum *").splitlines())

    with host.sudo():
        before = files()
        host.check_output(
            "cd /etc/rabbitmq && chmod 0644 rabbitmq.conf && chgrp root rabbitmq-env.conf && chown root enabled_plugins"
        )
        host.check_output("cd /etc/rabbitmq && rm definitions.json && echo '%% by hand' >>erl_inetrc")
        assert files() != before
        done = run_playbook("playbooks/broker.yml", "--tags", "rabbitmq")
        assert done.returncode == 0, done.stdout
        assert files() == before
    assert "changed=0 " in run_playbook("playbooks/broker.yml", "--tags", "rabbitmq").stdout


# Packages on the EL stand-in, whose repository has two releases of each package, and a newer series that the pins exclude.


@pytest.fixture
def dnf(host, variables):
    if "testbed_bad_repositories" not in variables:
        pytest.skip("Only the stand-in of an EL host has known releases.")

    def call(arguments):
        with host.sudo():
            return host.check_output(f"dnf --quiet --assumeyes {arguments}")

    return call


def installed(host):
    return host.check_output("rpm --query --queryformat '%{name}-%{version}-%{release} ' erlang rabbitmq-server").split()


def test_dnf_upgrade_stays_in_the_series_and_restarts_the_broker(host, dnf):
    newest = installed(host)
    dnf("downgrade erlang rabbitmq-server")
    assert [name.replace("-1.el", "-2.el") for name in installed(host)] == newest != installed(host)
    dnf("upgrade")
    assert installed(host) == newest
    with host.sudo():
        host.check_output("rabbitmqctl --quiet await_startup --timeout 60")


def test_run_restarts_a_broker_that_still_uses_an_older_erlang(host, dnf, run_playbook):
    def process():
        with host.sudo():
            return host.check_output("systemctl show --property MainPID --value rabbitmq-server")

    newest = installed(host)
    dnf("downgrade erlang")
    before = process()
    assert "changed=1 " in run_playbook("playbooks/broker.yml").stdout
    assert process() not in ("0", before)
    assert installed(host) != newest, "the run upgraded a package"
    dnf("upgrade erlang")


def test_changed_erlang_cookie_restarts_the_broker(host, run_playbook):
    """The broker reads the cookie only when it starts. rabbitmqctl reads it in every call."""
    with host.sudo():
        before = host.check_output("systemctl show --property MainPID --value rabbitmq-server.service")
    done = run_playbook("playbooks/broker.yml", rabbitmq_erlang_cookie="AnotherCookieOfThisTest")
    assert done.returncode == 0, done.stdout
    with host.sudo():
        assert host.check_output("systemctl show --property MainPID --value rabbitmq-server.service") != before
        host.check_output("rabbitmqctl --quiet await_startup")
    done = run_playbook("playbooks/broker.yml")
    assert done.returncode == 0, done.stdout
    with host.sudo():
        host.check_output("rabbitmqctl --quiet await_startup")


SECRETS = (
    "secret_rabbitmq_administrator_password",
    "secret_rabbitmq_app_password",
    "secret_rabbitmq_flower_password",
    "secret_rabbitmq_erlang_cookie",
)


def hashes(host):
    """The hashes in the definitions file and in the broker."""
    with host.sudo():
        text = host.check_output("cat /etc/rabbitmq/definitions.json; rabbitmqctl --quiet export_definitions - --format json")
    found = re.findall(r'"password_hash": *"([^"]+)"', text)
    assert len(found) > 3
    return found


def test_run_with_changed_secrets_prints_no_secret(host, api, run_playbook, variables):
    """The cookie is changed only in check mode, since another cookie would restart the broker."""
    changed = {name: f"Changed{name.replace('_', '')}0123" for name in SECRETS}
    kept = hashes(host)
    checked = run_playbook("playbooks/broker.yml", "-vvv", "--diff", "--check", **changed)
    assert checked.returncode == 0, checked.stdout
    for file in ("/var/lib/rabbitmq/.erlang.cookie", "/etc/rabbitmq/definitions.json"):
        assert f"--- before: {file}" in checked.stdout
    passwords = {name: changed[name] for name in SECRETS if name != "secret_rabbitmq_erlang_cookie"}
    done = run_playbook("playbooks/broker.yml", "-vvv", "--diff", **passwords)
    assert done.returncode == 0, done.stdout
    assert api("whoami", auth=("admin", changed["secret_rabbitmq_administrator_password"]))["name"] == "admin"
    kept += hashes(host)
    again = run_playbook("playbooks/broker.yml", "-vvv", "--diff")
    assert again.returncode == 0, again.stdout
    assert api("whoami")["name"] == "admin"
    output = "".join(run.stdout + run.stderr for run in (checked, done, again))
    for secret in [*changed.values(), *(variables[name] for name in SECRETS), *kept]:
        assert secret not in output


@pytest.mark.parametrize("series", ["4.3", "3.13"])
def test_version_that_can_not_read_the_data_is_refused(host, run_playbook, series):
    """RabbitMQ 4.3 can't read the data of 4.0, and an older series can't read it either."""
    pin = "/etc/apt/preferences.d/rabbitmq-server" if not host.exists("dnf") else "/etc/rabbitmq/rabbitmq.conf"
    with host.sudo():
        before = host.check_output(f"stat --format=%Y {pin}; pidof beam.smp")
        wanted = {"rabbitmq_version": series, "rabbitmq_source": "team_rabbitmq"}
        # The first play refuses 3.13, since the role does not support it.
        done = run_playbook("playbooks/broker.yml", "--tags", "rabbitmq", **wanted)
        assert done.returncode == 2
        sentence = "which can read the data of 4.2, 4.3 only" if series == "4.3" else "rabbitmq_version 3.13 does not run on Erlang"
        assert sentence in done.stdout
        assert host.check_output(f"stat --format=%Y {pin}; pidof beam.smp") == before


def test_broker_is_confined(host, exposure, inside, is_el):
    assert exposure("rabbitmq-server") <= 1.5
    if not is_el:
        host.run("epmd -names")  # the socket starts the service
        assert exposure("epmd") <= 1.5
    refused = inside("rabbitmq-server", "rabbitmq", "touch /etc/rabbitmq/probe")
    assert "Read-only file system" in refused.stderr
    assert inside("rabbitmq-server", "rabbitmq", "touch /var/lib/rabbitmq/probe").rc == 0
