"""Attacks from another host, and on the ports of Erlang and PostgreSQL from the host itself."""

from __future__ import annotations

import socket
import struct

import psycopg
import pytest

PORTS = [4369, 5432, 5555, 5672, 8000, 15672, 15692, 25672]
HELLOS = {
    4369: b"\x00\x01n",
    5432: struct.pack(">II", 8, 80877103),
    5672: b"AMQP\0\0\x09\x01",
    25672: b"\x00\x15n\x00\x05\x00\x03\x7f\xbdevil@evil.test",
}


@pytest.mark.attack(kind="network: from another host")
@pytest.mark.parametrize("port", PORTS)
def test_service_does_not_answer_another_host(variables, port):
    """The testbed publishes this port of the host's network address. The service must listen only on the loopback address."""
    hello = HELLOS.get(port, b"GET / HTTP/1.0\r\n\r\n")
    received = b""
    try:
        with socket.create_connection(("127.0.0.1", variables["testbed_published"][str(port)]), timeout=3) as connection:
            connection.sendall(hello)
            received = connection.recv(100)
    except OSError:
        pass
    assert received == b""


@pytest.mark.attack(kind="network: from another host")
def test_only_ssh_and_the_proxy_listen_for_other_hosts(root):
    lines = root("ss --no-header --listening --tcp --udp --numeric").stdout.splitlines()
    addresses = {line.split()[4] for line in lines}
    outside = {address.rpartition(":") for address in addresses if not address.startswith(("127.", "[::1]"))}
    assert {int(port) for _, _, port in outside} == {22, 80}


# ---- Erlang ----

USERS = ["mailroom", "mailroom-build", "mailroom-flower", "postgres", "nobody", "www-data"]


@pytest.mark.attack(kind="Erlang distribution")
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("command", ["rabbitmqctl status", "rabbitmqctl list_users", "cat /var/lib/rabbitmq/.erlang.cookie"])
def test_other_users_can_not_use_the_cookie(root, user, command):
    done = root(f"cd / && runuser -u {user} -- {command}")
    assert done.rc != 0
    assert "administrator" not in done.stdout


COOKIES = ["", "wrong", "monster", "guest", "'\"", "a" * 255]


@pytest.mark.attack(kind="Erlang distribution")
@pytest.mark.parametrize("cookie", COOKIES, ids=["empty", "wrong", "monster", "guest", "quotes", "long"])
def test_node_with_another_cookie_is_refused(root, cookie):
    node = root("rabbitmqctl --quiet eval 'node().'").stdout.strip().strip("'")
    assert "@" in node
    script = f"io:format(~s|~p ~p~n|, [net_adm:ping(list_to_atom(~s|{node}|)), nodes()]), halt()."
    names = "-name" if "." in node.partition("@")[2] else "-sname"
    given = "" if not cookie else f"-setcookie {quoted(cookie)}"
    command = (
        f"cd / && runuser -u nobody -- env HOME=/tmp/attack erl -noinput {names} attack@localhost {given} -eval {quoted(script)}"
    )
    root("install -d -o nobody /tmp/attack")
    done = root(command)
    assert "pong" not in done.stdout and ("pang []" in done.stdout or done.rc != 0), done.stdout + done.stderr


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


EPMD = {"kill": b"k", "stop the broker": b"srabbit", "dump": b"d"}


@pytest.mark.attack(kind="Erlang distribution")
@pytest.mark.parametrize("request_", EPMD.values(), ids=EPMD)
def test_port_mapper_keeps_the_broker_registered(root, published, request_):
    root("epmd -names")  # epmd.socket starts epmd
    try:
        with socket.create_connection(("127.0.0.1", published(4369)), timeout=3) as connection:
            connection.sendall(struct.pack(">H", len(request_)) + request_)
            connection.recv(100)
    except OSError:
        pass
    assert "name rabbit at port 25672" in root("epmd -names").stdout


HANDSHAKES = {
    "random bytes": b"\xff" * 2000,
    "long length": b"\xff\xff" + b"n" * 10,
    "HTTP": b"GET / HTTP/1.0\r\n\r\n",
    "old version": b"\x00\x0bn\x00\x01\x00\x00\x00\x00a@b",
    "name of the broker": b"\x00\x15n\x00\x05\x00\x03\x7f\xbdrabbit@localhost",
    "new protocol": b"\x00\x1bN\x00\x00\x00\x0d\xdf\x7f\xbd\x00\x00\x00\x01\x00\x0cattack@local",
}


@pytest.mark.attack(kind="Erlang distribution")
@pytest.mark.parametrize("data", HANDSHAKES.values(), ids=HANDSHAKES)
def test_bad_handshake_does_not_stop_the_broker(root, published, data):
    before = root("pidof beam.smp").stdout
    try:
        with socket.create_connection(("127.0.0.1", published(25672)), timeout=3) as connection:
            connection.sendall(data)
            # The attack does not answer the challenge, so the answer of the host does not end with "sok".
            answer = connection.recv(1000)
            assert b"alive" not in answer
    except OSError:
        pass
    assert root("pidof beam.smp").stdout == before != ""
    assert root("rabbitmqctl --quiet list_queues --vhost mailroom name").rc == 0
    assert root("rabbitmqctl --quiet eval 'nodes(known) -- [node()].'").stdout.count("attack@") == 0


# ---- PostgreSQL ----


def login(published, **words):
    return psycopg.connect(host="127.0.0.1", port=published(5432), connect_timeout=10, autocommit=True, **words)


@pytest.mark.attack(kind="PostgreSQL: logins")
@pytest.mark.parametrize("database", ["mailroom", "postgres", "template1", "replication", "' OR 1=1 --"])
@pytest.mark.parametrize("password", [None, "", "mailroom", "postgres"])
@pytest.mark.parametrize("user", ["mailroom", "postgres", "mailroom-flower", "root", "nobody"])
def test_login_to_postgresql_is_refused(published, user, database, password):
    with pytest.raises(psycopg.OperationalError, match=r"no pg_hba.conf entry|authentication failed|no password supplied"):
        login(published, user=user, dbname=database, password=password)


@pytest.mark.attack(kind="PostgreSQL: logins")
@pytest.mark.parametrize("database", ["postgres", "template1"])
def test_application_reaches_only_its_database(published, variables, database):
    with pytest.raises(psycopg.OperationalError, match=r"no pg_hba.conf entry"):
        login(published, user="mailroom", dbname=database, password=variables["secret_postgresql_app_password"])


@pytest.mark.attack(kind="PostgreSQL: logins")
@pytest.mark.parametrize(("user", "role"), [(user, role) for user in USERS for role in ("postgres", "mailroom") if user != role])
def test_other_users_have_no_role_on_the_socket(root, user, role):
    done = root(f"cd / && runuser -u {user} -- psql --no-password --username={role} --dbname=mailroom --command='SELECT 1'")
    assert done.rc != 0 and "1 row" not in done.stdout, done.stdout


STATEMENTS = [
    "SELECT rolpassword FROM pg_authid",
    "SELECT passwd FROM pg_shadow",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_ls_dir('/')",
    "SELECT pg_read_binary_file('pg_hba.conf')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_export(1, '/tmp/x')",
    "COPY (SELECT 1) TO '/tmp/x'",
    "COPY emails_email FROM PROGRAM 'id'",
    "COPY (SELECT 1) TO PROGRAM 'id'",
    "CREATE EXTENSION file_fdw",
    "CREATE EXTENSION dblink",
    "CREATE FUNCTION f() RETURNS int LANGUAGE c AS 'libc.so.6', 'system'",
    "CREATE FUNCTION f() RETURNS int LANGUAGE internal AS 'pg_read_file'",
    "LOAD '/tmp/x.so'",
    "ALTER SYSTEM SET archive_command = 'id'",
    "SET log_statement = 'all'",
    "SET session_preload_libraries = 'x'",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
    "ALTER ROLE mailroom SUPERUSER",
    "ALTER ROLE postgres PASSWORD 'x'",
    "CREATE ROLE mallory LOGIN",
    "GRANT pg_read_server_files TO mailroom",
    "GRANT pg_execute_server_program TO mailroom",
    "CREATE DATABASE mallory",
    "CREATE TABLESPACE mallory LOCATION '/tmp'",
    "DROP DATABASE postgres",
    "SELECT pg_reload_conf()",
    "SELECT pg_rotate_logfile()",
    "SELECT pg_switch_wal()",
    "SELECT pg_create_physical_replication_slot('mallory')",
    "CREATE SUBSCRIPTION s CONNECTION 'host=evil.test' PUBLICATION p",
    "CREATE EVENT TRIGGER e ON ddl_command_start EXECUTE FUNCTION pg_catalog.now()",
    "UPDATE pg_database SET datname = 'x'",
    "SELECT pg_stat_reset_shared('io')",
]


@pytest.mark.attack(kind="PostgreSQL: privileges")
@pytest.mark.parametrize("statement", STATEMENTS)
def test_application_role_is_refused(published, variables, statement):
    with (
        login(published, user="mailroom", dbname="mailroom", password=variables["secret_postgresql_app_password"]) as connection,
        pytest.raises(
            (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidFunctionDefinition, psycopg.errors.WrongObjectType)
        ),
    ):
        connection.execute(statement)


@pytest.mark.attack(kind="PostgreSQL: privileges")
def test_application_role_can_not_end_sessions_of_other_roles(published, variables, root):
    with login(published, user="mailroom", dbname="mailroom", password=variables["secret_postgresql_app_password"]) as connection:
        pids = root("pgrep --uid postgres --full 'checkpointer|autovacuum launcher'").stdout.split()
        assert pids
        for pid in pids:
            try:
                ended = connection.execute(f"SELECT pg_terminate_backend({int(pid)})").fetchone()[0]
            except psycopg.errors.InsufficientPrivilege:
                ended = False
            assert not ended


DAMAGED = {
    "zero length": struct.pack(">I", 0),
    "huge length": struct.pack(">I", 2**31),
    "no terminator": struct.pack(">II", 12, 196608) + b"user",
    "many options": struct.pack(">II", 9000, 196608) + b"a\0" * 4496,
    "cancel": struct.pack(">IIII", 16, 80877102, 1, 1),
    "GSS": struct.pack(">II", 8, 80877104) + b"\xff" * 100,
    "replication": struct.pack(">II", 41, 196608) + b"user\0postgres\0replication\0true\0\0\0",
}


@pytest.mark.attack(kind="PostgreSQL: protocol")
@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_startup_does_not_stop_postgresql(root, published, data):
    before = root("systemctl show --property=MainPID --value 'postgresql@*'").stdout
    received = b""
    try:
        with socket.create_connection(("127.0.0.1", published(5432)), timeout=3) as connection:
            connection.sendall(data)
            received = connection.recv(1000)
    except OSError:
        pass
    # R and five zeros after the length would be "authentication succeeded".
    assert b"R\0\0\0\x08\0\0\0\0" not in received
    assert root("systemctl show --property=MainPID --value 'postgresql@*'").stdout == before
    assert (
        root(
            "curl --silent --fail http://127.0.0.1:8000/healthz || python3 -c \"import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz')\""
        ).rc
        == 0
    )
