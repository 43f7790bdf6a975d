"""Tests the server that the role postgresql installs: logins, memory settings, backup and restore."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture
def connect(published, variables):
    """Connects from this machine; by default as the application's user to its database."""
    connections = []

    def connection(user="mailroom", password=None, dbname="mailroom"):
        connections.append(
            psycopg.connect(
                host="127.0.0.1",
                port=published(5432),
                user=user,
                password=password or variables["secret_postgresql_app_password"],
                dbname=dbname,
                connect_timeout=10,
                autocommit=True,
            )
        )
        return connections[-1]

    yield connection
    for each in connections:
        each.close()


@pytest.fixture
def ops(tmp_path, variables):
    """Runs a playbook from playbooks/ops on the host, with backups in the test's folder."""

    def run(name, *arguments):
        return subprocess.run(
            [
                Path(sys.executable).parent / "ansible-playbook", f"playbooks/ops/{name}.yml",
                "--limit", variables["inventory_hostname"], "--extra-vars", f"backup_directory={tmp_path}", *arguments,
            ],
            cwd=PROJECT,
            env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip

    return run


def rows(connection):
    return connection.execute("SELECT id, text FROM kept ORDER BY id").fetchall()


def test_app_user_owns_its_database(connect):
    connection = connect()
    connection.execute("CREATE TABLE own (id int)")
    connection.execute("DROP TABLE own")
    assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)


@pytest.mark.parametrize(
    ("login", "refusal"),
    [
        pytest.param({"password": "another password"}, "password authentication failed", id="wrong password"),
        pytest.param({"dbname": "other"}, "no pg_hba.conf entry", id="another's database"),
        pytest.param({"user": "other", "dbname": "other"}, "no pg_hba.conf entry", id="from an address that is not listed"),
        pytest.param({"user": "postgres", "dbname": "postgres"}, "no pg_hba.conf entry", id="the server's own user"),
    ],
)
def test_unlisted_logins_are_refused(connect, login, refusal):
    with pytest.raises(psycopg.OperationalError, match=refusal):
        connect(**login)


def test_app_user_cannot_create_users_or_databases(connect):
    for statement in ("CREATE USER more", "CREATE DATABASE more", "COPY (SELECT 1) TO PROGRAM 'true'"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connect().execute(statement)


def test_passwords_are_stored_as_scram(host):
    with host.sudo("postgres"):
        kept = host.check_output("psql -Atc \"SELECT rolpassword FROM pg_authid WHERE rolname = 'mailroom'\"")
    assert kept.startswith("SCRAM-SHA-256$")


def test_memory_settings_follow_the_hosts_memory(host, connect):
    megabytes = int(host.check_output("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo"))
    buffers = connect().execute("SELECT setting::int * 8 / 1024 FROM pg_settings WHERE name = 'shared_buffers'").fetchone()[0]
    assert buffers == megabytes // 2 // 4
    assert connect().execute("SHOW max_connections").fetchone() == ("50",)
    assert connect().execute("SHOW log_connections").fetchone()[0] in ("on", "all")


def test_password_is_not_on_command_lines_or_in_logs(host, variables):
    with host.sudo():
        assert variables["secret_postgresql_app_password"] not in host.check_output("ps -e -o args")
        logs = host.run("journalctl --no-pager; cat /var/log/postgresql/*.log").stdout
    assert "connection authorized" in logs
    assert variables["secret_postgresql_app_password"] not in logs


def test_run_with_changed_passwords_prints_no_password(host, connect, run_playbook, variables):
    changed = {name: f"Changed-{name}-0123" for name in ("secret_postgresql_app_password", "secret_flower_password")}
    done = run_playbook("playbooks/database.yml", "-vvv", "--diff", **changed)
    assert done.returncode == 0, done.stdout
    connect(password=changed["secret_postgresql_app_password"]).execute("SELECT 1")
    with host.sudo("postgres"):
        kept = host.check_output("psql -Atc \"SELECT rolpassword FROM pg_authid WHERE rolname IN ('mailroom', 'other')\"")
    again = run_playbook("playbooks/database.yml", "-vvv", "--diff")
    assert again.returncode == 0, again.stdout
    for secret in [*changed.values(), *(variables[name] for name in changed), *kept.split()]:
        assert secret not in done.stdout + done.stderr + again.stdout + again.stderr


def test_restore_replaces_the_database_with_the_backup(connect, ops, tmp_path):
    connect().execute("DROP TABLE IF EXISTS kept; CREATE TABLE kept (id serial PRIMARY KEY, text text)")
    connect().execute("INSERT INTO kept (text) VALUES ('one'), ('zwölf')")
    before = rows(connect())
    done = ops("backup_postgresql")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mailroom.pgc").stat().st_mode & 0o077 == 0
    connect().execute("DELETE FROM kept WHERE id = 1; CREATE TABLE later (id int)")

    assert "-e confirm=yes" in ops("restore_postgresql").stdout
    assert rows(connect()) == before[1:], "the restore changed something without confirmation"

    done = ops("restore_postgresql", "--extra-vars", "confirm=yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(connect()) == before
    assert connect().execute("SELECT to_regclass('later')").fetchone() == (None,)
    assert connect().execute("INSERT INTO kept (text) VALUES ('three') RETURNING id").fetchone() == (3,)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        pytest.param(lambda dumps: (b"", dumps["other"]), "mailroom.pgc is not a complete dump", id="empty"),
        pytest.param(lambda dumps: (b"PGDMP no dump", dumps["other"]), "mailroom.pgc is not a complete dump", id="no dump"),
        pytest.param(
            lambda dumps: (dumps["mailroom"][: -len(dumps["mailroom"]) // 3], dumps["other"]),
            "mailroom.pgc is not a complete dump that this host can restore: pg_restore: error:",
            id="truncated",
        ),
        pytest.param(
            lambda dumps: (dumps["mailroom"], dumps["mailroom"]),
            "other.pgc is a dump of the database mailroom, not of other.",
            id="dump of another database",
        ),
    ],
)
def test_restore_refuses_a_broken_or_foreign_dump(host, connect, ops, tmp_path, damage, sentence):
    connect().execute("DROP TABLE IF EXISTS kept; CREATE TABLE kept (id serial PRIMARY KEY, text text)")
    connect().execute("INSERT INTO kept (text) SELECT md5(n::text) FROM generate_series(1, 1000) n")
    done = ops("backup_postgresql")
    assert done.returncode == 0, done.stdout + done.stderr
    files = {name: tmp_path / f"{name}.pgc" for name in ("mailroom", "other")}
    for file, content in zip(files.values(), damage({name: file.read_bytes() for name, file in files.items()}), strict=True):
        file.write_bytes(content)
    connect().execute("DELETE FROM kept WHERE id > 1")
    done = ops("restore_postgresql", "--extra-vars", "confirm=yes")
    assert done.returncode != 0
    assert sentence in done.stdout, done.stdout
    assert len(rows(connect())) == 1
    with host.sudo("postgres"):
        assert "_restored" not in host.check_output("psql -Atc 'SELECT datname FROM pg_database'")
    assert not host.file("/var/lib/postgresql-dumps").exists


def test_killed_server_restarts_with_committed_data(host, connect, eventually):
    connect().execute("DROP TABLE IF EXISTS kept; CREATE TABLE kept (id serial PRIMARY KEY, text text)")
    connect().execute("INSERT INTO kept (text) VALUES ('committed')")
    with host.sudo():
        host.check_output("pkill --signal KILL --uid postgres")

    def answers():
        try:
            return rows(connect())
        except psycopg.OperationalError as error:
            raise AssertionError(error) from error

    assert eventually(answers, seconds=60) == [(1, "committed")]


def test_other_addresses_are_denied(host, is_el):
    """The test hosts' kernel does not enforce this limit."""
    unit = "postgresql" if is_el else host.check_output("basename /etc/postgresql/*").join(["postgresql@", "-main"])
    shown = host.check_output(f"systemctl show --property=IPAddressDeny,IPAddressAllow {unit}")
    found = {name: set(addresses.split()) for name, addresses in (line.split("=") for line in shown.splitlines())}
    assert found == {
        "IPAddressAllow": {"127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"},
        "IPAddressDeny": {"0.0.0.0/0", "::/0"},
    }


def test_server_is_confined_and_stops_in_order(host, exposure, inside, is_el, eventually):
    unit = "postgresql" if is_el else host.check_output("basename /etc/postgresql/*").join(["postgresql@", "-main"])
    # A server that was killed answers before its unit is active again.
    eventually(lambda: host.service(unit).is_running)
    assert exposure(unit) <= 2.0
    assert "Read-only file system" in inside(unit, "postgres", "touch /etc/probe").stderr
    with host.sudo():
        # If the stop failed, systemd would kill the server.
        host.check_output(f"systemctl restart {unit}")
        assert host.check_output(f"systemctl show --property=Result --value {unit}") == "success"
        said = host.check_output(f"journalctl --no-pager --lines=30 --unit={unit}")
    assert "pid file is invalid" not in said
