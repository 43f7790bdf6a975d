"""Tests the encrypted connections between hosts, and that clients refuse a server that they can't verify."""

from __future__ import annotations

import datetime
import shlex

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

AUTHORITY = "/etc/ssl/mailroom-ca.pem"
# The application's clients: they print `connected`, or the error.
AMQP = """
from kombu import Connection
from mailroom.tls import VerifiedTLS
url, authority = {url!r}, {authority!r}
try:
    Connection(url, ssl=VerifiedTLS(**({{"ca_certs": authority}} if authority else {{}}))).ensure_connection(max_retries=1)
    print("connected")
except Exception as error:
    print(error)
"""
POSTGRESQL = """
import psycopg
try:
    psycopg.connect({url!r})
    print("connected")
except psycopg.Error as error:
    print(error)
"""


@pytest.fixture
def client(on):
    """Runs a client in the application's environment on the web host; returns its output."""

    def run(program, **values):
        python = "cd /opt/mailroom/current && PYTHONPATH=. venv/bin/python -c "
        return on("web1", python + shlex.quote(program.format(**values)))

    return run


@pytest.fixture
def amqp(client, variables):
    account = f"mailroom:{variables['secret_rabbitmq_app_password']}"
    return lambda name="mq1", authority=AUTHORITY: client(AMQP, url=f"amqps://{account}@{name}:5671/mailroom", authority=authority)


@pytest.fixture
def postgresql(client, variables):
    account = f"mailroom:{variables['secret_postgresql_app_password']}"
    return lambda options, name="db1": client(POSTGRESQL, url=f"postgresql://{account}@{name}:5432/mailroom?{options}")


@pytest.fixture
def other_name(on):
    """On the web host, gives the broker and the database names that their certificates lack."""
    on("web1", "cp /etc/hosts /etc/hosts.before")
    on("web1", "for name in mq1 db1; do echo \"$(getent ahostsv4 $name | awk '{print $1; exit}') other-$name\" >>/etc/hosts; done")
    yield "other"
    on("web1", "cat /etc/hosts.before >/etc/hosts && rm /etc/hosts.before")


def test_broker_is_reached_only_with_its_authority_and_its_name(amqp, other_name):
    assert amqp() == "connected"
    assert "certificate verify failed" in amqp(authority="")
    assert "Hostname mismatch" in amqp(f"{other_name}-mq1")


def test_database_is_reached_only_with_its_authority_and_its_name(postgresql, other_name):
    verified = f"sslmode=verify-full&sslrootcert={AUTHORITY}"
    assert postgresql(verified) == "connected"
    assert "certificate verify failed" in postgresql("sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca-certificates.crt")
    assert "does not match host name" in postgresql(verified, f"{other_name}-db1")


def test_database_refuses_a_connection_without_tls(postgresql):
    assert "no encryption" in postgresql("sslmode=disable")


def test_services_use_tls(on):
    """The application's own connections, and those of Flower on the broker's host."""
    for line in on("mq1", "rabbitmqctl --quiet list_connections user ssl").splitlines()[1:]:
        assert line.endswith("true"), line
    query = (
        "select count(*) filter (where not ssl), count(*) from pg_stat_ssl join pg_stat_activity using (pid) "
        "where usename = 'mailroom'"
    )
    without, together = on("db1", f'cd / && runuser -u postgres -- psql -Atc "{query}"').split("|")
    assert without == "0" and int(together) > 0


def expired(variables, names):
    """A key, and a certificate of the environment's authority that expired yesterday."""
    text = variables["secret_certificate_authority"]
    authority = x509.load_pem_x509_certificate(text.encode())
    secret = serialization.load_pem_private_key(text[text.index("-----BEGIN P") :].encode(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now - datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(secret, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    return (
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain).decode(),
        certificate.public_bytes(serialization.Encoding.PEM).decode(),
    )


@pytest.mark.parametrize(
    ("name", "service", "unit", "error"),
    [
        ("mq1", "rabbitmq", "rabbitmq-server", "certificate has expired"),
        ("db1", "postgresql", "postgresql@17-main", "certificate verify failed"),
    ],
)
def test_expired_certificate_is_refused_and_replaced_without_a_restart(
    on, variables, run_playbook, amqp, postgresql, send, inbox, eventually, name, service, unit, error
):
    verified = f"sslmode=verify-full&sslrootcert={AUTHORITY}"
    connect = {"rabbitmq": amqp, "postgresql": lambda: postgresql(verified)}[service]
    process = on(name, f"systemctl show --property MainPID --value {unit}")
    for file, text in zip(("key", "certificate"), expired(variables, [name]), strict=True):
        on(name, f"printf %s {shlex.quote(text)} >/etc/ssl/{service}/{file}.pem")
    on(name, f"systemctl reload {unit}")
    try:
        eventually(lambda: error in connect())
    finally:
        done = run_playbook("site.yml", "--limit", name, "--tags", service)
    assert done.returncode == 0, done.stdout + done.stderr
    # The role has read the expired certificate.
    assert f"The certificate of {service} is valid for 396 days." in done.stdout
    eventually(lambda: connect() == "connected")
    assert on(name, f"systemctl show --property MainPID --value {unit}") == process
    subject, state = send()
    eventually(lambda: state() == "sent")
    assert inbox().count(subject) == 1
