"""Tests the server of the role valkey: logins, forbidden commands, persistence, its memory limit, TLS and its sandbox."""

from __future__ import annotations

import pytest

TLS = "--tls --cacert /etc/valkey/tls/ca.pem"


@pytest.fixture
def is_tls(host):
    return host.backend.get_hostname() == "tls"


@pytest.fixture
def call(host, variables, is_tls):
    """Sends a command to the server, by default with the password; returns its output."""

    def run(command, options=None, password=None):
        login = f"--no-auth-warning -a {password or variables['secret_valkey_password']}" if password != "" else ""
        with host.sudo():
            done = host.run(f"valkey-cli {options or (TLS if is_tls else '')} {login} {command}")
        return done.stdout.strip() + done.stderr.strip()

    return run


def test_client_with_the_password_reads_and_writes(call):
    assert call("SET greeting hello EX 60") == "OK"
    assert call("GET greeting") == "hello"
    assert call("EVAL \"return redis.call('GET', KEYS[1])\" 1 greeting") == "hello"
    assert call("-n 1 SET result 5") == "OK"
    assert call("FLUSHDB") == "OK"
    assert (call("GET greeting"), call("-n 1 GET result")) == ("", "5")


@pytest.mark.attack
def test_client_without_the_password_is_refused(call):
    assert "NOAUTH" in call("GET greeting", password="")
    assert "WRONGPASS" in call("GET greeting", password="another-password")  # noqa: S106 - no password of a server


@pytest.mark.attack
@pytest.mark.parametrize(
    "command", ["CONFIG GET dir", "SHUTDOWN NOSAVE", "REPLICAOF 192.0.2.1 6379", "ACL LIST", "BGSAVE", "MONITOR"]
)
def test_client_can_not_administer_the_server(call, command):
    assert call(command).startswith("NOPERM"), command
    assert call("PING") == "PONG"


def test_data_survives_a_kill(host, call, eventually):
    assert call("SET kept yes") == "OK"
    # Valkey syncs its file once per second.
    assert call("WAITAOF 1 0 5000") != ""
    with host.sudo():
        host.check_output("kill -9 $(systemctl show --property MainPID --value valkey-server)")
    eventually(lambda: call("GET kept") == "yes")


def test_full_memory_evicts_only_keys_with_an_expiry_time(call):
    assert call("SET kept yes") == "OK"
    for number in range(40):
        script = "return redis.call('SET', KEYS[1], string.rep('x', 1000000), 'EX', 600)"
        assert call(f'EVAL "{script}" 1 big{number}') == "OK"
    assert 1 < int(call("DBSIZE")) < 25
    assert call("GET kept") == "yes"


def test_secrets_are_unreadable_for_other_users(host, variables):
    assert host.run("ls /etc/valkey").rc != 0
    with host.sudo():
        text = host.file("/etc/valkey/valkey.conf").content_string
    assert variables["secret_valkey_password"] not in text


@pytest.mark.attack
def test_connection_without_tls_or_with_another_ca_is_refused(call, is_tls):
    if not is_tls:
        pytest.skip("This server has no TLS.")
    assert call("PING") == "PONG"
    assert "PONG" not in call("PING", options="-h 127.0.0.1")
    assert "certificate verify failed" in call("PING", options="--tls --cacert /etc/ssl/certs/ca-certificates.crt")


def test_unit_is_confined(host, exposure, inside):
    """The server can't run other programs or write to its configuration."""
    assert exposure("valkey-server") <= 1.5
    started = inside("valkey-server", "valkey", "true")
    assert (started.rc, "Permission denied" in started.stderr) == (126, True)
    with host.sudo():
        pid = host.check_output("systemctl show --property=MainPID --value valkey-server")
        mounts = host.check_output(f"cat /proc/{pid}/mounts")
    options = {line.split()[1]: line.split()[3].split(",")[0] for line in mounts.splitlines()}
    assert (options["/"], options["/var/lib/valkey"], options.get("/etc/valkey", "ro")) == ("ro", "rw", "ro")
