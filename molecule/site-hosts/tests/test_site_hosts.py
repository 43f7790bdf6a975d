"""The whole environment with each layer on a host of its own: what only hosts that depend on each other can get wrong."""

from __future__ import annotations

import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

APP = Path(__file__).resolve().parents[3] / "app"
BAD_MIGRATION = """
from django.db import migrations


def refuse(apps, schema_editor):
    raise RuntimeError("this migration fails")


class Migration(migrations.Migration):
    dependencies = [("emails", "LAST")]
    operations = [migrations.RunPython(refuse)]
"""


@pytest.fixture
def send(site, variables):
    """Asks for an email; gives its subject and a look at its state."""
    headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}

    def post():
        subject = f"test {uuid.uuid4()}"
        email = {"subject": subject, "text": "Hello.", "to": ["one@example.net"]}
        answer = requests.post(f"{site}/api/emails", json=email, headers=headers, timeout=10)
        assert answer.status_code == 202, answer.text
        status = f"{site}/api/emails/{answer.json()['id']}"
        return subject, lambda: requests.get(status, headers=headers, timeout=10).json()["state"]

    return post


@pytest.fixture
def on(host, inventory):
    """Runs a command on a host by its name, as root; gives what it printed."""

    def run(name, command):
        other = host.get_host(f"ansible://{name}", ansible_inventory=str(inventory))
        with other.sudo():
            return other.check_output(command)

    return run


def test_email_goes_from_host_to_host(send, inbox, eventually):
    subject, state = send()
    eventually(lambda: state() == "sent")
    assert inbox().count(subject) == 1


@pytest.mark.parametrize(
    ("source", "port", "is_open"),
    [
        ("web1", "mq1 5672", True),
        ("worker1", "mq1 5672", True),
        ("db1", "mq1 5672", False),
        ("worker1", "db1 5432", True),
        ("mq1", "db1 5432", False),
    ],
)
def test_a_layer_s_port_is_open_to_the_layers_that_need_it(on, source, port, is_open):
    connect = "import socket, sys; socket.create_connection(sys.argv[1:], timeout=3)"
    done = on(source, f"python3 -c '{connect}' {port} 2>&1 || true")
    assert (done == "") is is_open, done


@pytest.mark.parametrize(
    ("role", "variables", "fault"),
    [
        ("firewall", {"firewall_rules": [{"ports": [80], "sources": ["web9"]}]}, "firewall_rules has the sources web9"),
        (
            "postgresql",
            {"postgresql_clients": [{"address": "web9", "database": "mailroom", "user": "mailroom"}]},
            "postgresql_clients has web9",
        ),
    ],
)
def test_a_name_without_an_address_is_refused(run_playbook, role, variables, fault):
    done = run_playbook("site.yml", "--limit", "db1", "--tags", role, "--check", **variables)
    assert done.returncode != 0
    assert f"{fault}, which db1 can't resolve" in done.stdout, done.stdout


@pytest.fixture
def away(on):
    """Stops units of a host while the test does something."""

    @contextmanager
    def stop(name, *units):
        on(name, f"systemctl stop {' '.join(units)}")
        try:
            yield
        finally:
            on(name, f"systemctl start {units[0]}")

    return stop


def test_email_accepted_while_the_broker_s_host_is_away_arrives(send, inbox, away, eventually):
    with away("mq1", "rabbitmq-server"):
        subject, state = send()
        assert state() == "queued"
    eventually(lambda: state() == "sent", seconds=90)
    assert inbox().count(subject) == 1


def test_all_find_the_database_again(send, inbox, away, eventually):
    with away("db1", "postgresql", "'postgresql@*'"), pytest.raises(AssertionError, match="Database unavailable"):
        send()
    subject, state = eventually(send)
    eventually(lambda: state() == "sent", seconds=90)
    assert inbox().count(subject) == 1


def test_a_release_whose_migration_fails_reaches_no_host(run_playbook, on, send, eventually, tmp_path):
    """The migration runs on the web host; the worker's host must not go on to code that counts on it."""
    source = tmp_path / "app"
    shutil.copytree(APP, source, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    last = max(path.stem for path in APP.glob("emails/migrations/0*.py"))
    (source / "emails/migrations/9999_bad.py").write_text(BAD_MIGRATION.replace("LAST", last))
    names = ("web1", "worker1")
    look = "readlink /opt/mailroom/current; systemctl show --property MainPID --value 'mailroom-worker@mail' mailroom-relay"
    before = [on(name, look) for name in names]
    done = run_playbook("site.yml", "--limit", "all", "--tags", "django,celery", django_source=str(source))
    assert done.returncode != 0
    assert "this migration fails" in done.stdout, done.stdout
    assert [on(name, look) for name in names] == before
    _, state = send()
    eventually(lambda: state() == "sent")
