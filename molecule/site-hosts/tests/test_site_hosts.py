"""Tests the whole environment with each layer on a separate host."""

from __future__ import annotations

import shutil
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


def test_email_arrives_across_hosts(send, inbox, eventually):
    subject, state = send()
    eventually(lambda: state() == "sent")
    assert inbox().count(subject) == 1


@pytest.mark.parametrize(
    ("source", "port", "is_open"),
    [
        ("web1", "mq1 5671", True),
        ("worker1", "mq1 5671", True),
        ("db1", "mq1 5671", False),
        ("web1", "mq1 5672", False),
        ("worker1", "db1 5432", True),
        ("mq1", "db1 5432", False),
        ("worker1", "mq1 80", True),
    ],
)
def test_port_of_a_layer_is_open_only_to_layers_that_need_it(on, source, port, is_open):
    connect = "import socket, sys; socket.create_connection(sys.argv[1:], timeout=3)"
    done = on(source, f"python3 -c '{connect}' {port} 2>&1 || true")
    assert (done == "") is is_open, done


def test_proxy_on_another_host_forwards_requests(host, on):
    published = host.get_host("ansible://mq1").ansible.get_variables()["testbed_published"]["80"]
    answer = requests.get(f"http://127.0.0.1:{published}/healthz", timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"database": "ok"})
    address = on("web1", "getent ahosts mq1 | awk '{print $1; exit}'")
    assert f"--forwarded-allow-ips=127.0.0.1,::1,{address}" in on("web1", "systemctl cat mailroom-web.service")


@pytest.mark.parametrize(
    ("role", "variables", "fault"),
    [
        ("firewall", {"firewall_rules": [{"ports": [80], "sources": ["web9"]}]}, "firewall_rules has the sources web9"),
        (
            "postgresql",
            {"postgresql_clients": [{"address": "web9", "database": "mailroom", "user": "mailroom"}]},
            "postgresql_clients or postgresql_standbys have web9",
        ),
    ],
)
def test_unresolvable_name_is_refused(run_playbook, role, variables, fault):
    done = run_playbook("site.yml", "--limit", "db1", "--tags", role, "--check", **variables)
    assert done.returncode != 0
    assert f"{fault}, which db1 can't resolve" in done.stdout, done.stdout


@pytest.fixture
def away(on):
    """Stops units on a host during a with block."""

    @contextmanager
    def stop(name, *units):
        on(name, f"systemctl stop {' '.join(units)}")
        try:
            yield
        finally:
            on(name, f"systemctl start {units[0]}")

    return stop


def test_email_accepted_while_the_broker_is_down_arrives(send, inbox, away, eventually):
    with away("mq1", "rabbitmq-server"):
        subject, state = send()
        assert state() == "queued"
    eventually(lambda: state() == "sent", seconds=90)
    assert inbox().count(subject) == 1


def test_services_reconnect_to_the_database(send, inbox, away, eventually):
    with away("db1", "postgresql", "'postgresql@*'"), pytest.raises(AssertionError, match="Database unavailable"):
        send()
    subject, state = eventually(send)
    eventually(lambda: state() == "sent", seconds=90)
    assert inbox().count(subject) == 1


def test_release_with_a_failing_migration_is_activated_on_no_host(run_playbook, on, send, eventually, tmp_path):
    """The migration runs on the web host. The worker host must not activate code that depends on the migration."""
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
