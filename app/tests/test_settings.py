import json
import os
import subprocess
import sys

import pytest
from celery.app.defaults import NAMESPACES, flatten
from django.conf import settings

from emails.queues import DEAD_LETTERS
from mailroom.celery import app
from mailroom.tls import VerifiedTLS

DATABASE_URL = "postgresql://u:p@h/n"
SHOW = (
    "import json; from mailroom import settings as s;"
    "print(json.dumps({n: getattr(s, n) for n in dir(s) if n.isupper()}, default=str))"
)


def load(**variables) -> subprocess.CompletedProcess:
    """Loads the settings in a process that has only these environment variables."""
    return subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=settings.BASE_DIR,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": DATABASE_URL} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def values(**variables) -> dict:
    return json.loads(load(SECRET_KEY="x", **variables).stdout)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SECRET_KEY", ""),
        ("DEBUG", "flase"),
        ("HTTPS_ONLY", "2"),
        ("API_DOCS_PUBLIC", "2"),
        ("PREPARED_STATEMENTS", "maybe"),
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "mysql://user:password@host/name"),
        ("DATABASE_URL", "sqlite:////var/lib/db.sqlite3"),
        ("DATABASE_URL", "postgres://user:password@host:port/name"),
        ("BROKER_URL", "redis://:password@host"),
        ("BROKER_URL", "amqp://user:password@host:99999/"),
        ("BROKER_URL", "amqp://user:password@a;http://b"),
        ("EMAIL_URL", "smtp://user:password@host:port"),
        ("EMAIL_URL", "imap://user:password@host"),
        ("EMAIL_TIMEOUT", "ten"),
        ("EMAIL_TIMEOUT", "0"),
        ("DEFAULT_FROM_EMAIL", "nobody"),
        ("ALLOWED_SENDERS", "a@example.org,example.org"),
        ("MAX_RECIPIENTS", "0"),
        ("RETENTION_DAYS", "-1"),
        ("RELAY_POLL_SECONDS", "nan"),
        ("TASK_TIME_LIMIT", "5"),
        ("UNCERTAIN_POLICY", "maybe"),
        ("DELIVERY_BACKEND", "no.such.Backend"),
        ("RELAY_THREADS", "0"),
        ("RECIPIENTS_PER_HOUR", "-1"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "LOUD"),
        ("MAX_ATTACHMENTS", "-1"),
        ("MAX_BATCH", "0"),
        ("SMTP_CONNECTIONS", "-1"),
        ("DOMAIN_LIMITS", "example.org"),
        ("DOMAIN_LIMITS", '{"example.org": {"concurrent": 0}}'),
        ("DOMAIN_LIMITS", '{"Example.org": {"concurrent": 1}}'),
        ("DOMAIN_LIMITS", '{"example.org": {"per_hour": 5}}'),
    ],
)
def test_invalid_variable_is_named_and_its_value_hidden(name, value):
    loaded = load(**{"SECRET_KEY": "x", name: value})
    assert loaded.returncode != 0
    last_line = loaded.stderr.strip().splitlines()[-1]
    assert f"environment variable {name}: " in last_line
    assert "password" not in loaded.stderr


def test_debug_needs_no_other_variable():
    assert load(DEBUG="true").returncode == 0


def test_https_is_the_default_outside_debug():
    names = ("SECURE_SSL_REDIRECT", "SESSION_COOKIE_SECURE", "CSRF_COOKIE_SECURE")
    assert all(values()[name] for name in names)
    assert values()["SECURE_HSTS_SECONDS"] > 0
    plain = values(HTTPS_ONLY="false")
    assert not any(plain[name] for name in (*names, "SECURE_HSTS_SECONDS"))


def test_deployment_checks_pass():
    checked = subprocess.run(
        [sys.executable, "manage.py", "check", "--deploy", "--fail-level", "WARNING"],
        cwd=settings.BASE_DIR,
        env={"PATH": os.environ["PATH"], "ALLOWED_HOSTS": "example.org"}
        | {"DATABASE_URL": os.environ["TEST_DATABASE_URL"]}
        | {"SECRET_KEY": "0123456789abcdefghijklmnopqrstuvwxyz-0123456789-ABCDEF"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_databases_by_url():
    postgresql = values(DATABASE_URL="postgresql://u:p%40ss@h:5433/n?sslmode=verify-full")
    postgresql = postgresql["DATABASES"]["default"]
    assert postgresql["ENGINE"] == "django.db.backends.postgresql"
    assert (postgresql["PASSWORD"], postgresql["PORT"]) == ("p@ss", 5433)
    assert postgresql["OPTIONS"]["sslmode"] == "verify-full"
    assert postgresql["OPTIONS"]["prepare_threshold"] == 5
    through_a_pooler = values(DATABASE_URL="postgresql://u:p@h/n", PREPARED_STATEMENTS="false")
    assert "prepare_threshold" not in through_a_pooler["DATABASES"]["default"]["OPTIONS"]


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "ssl"),
    [
        ("smtp://mx.example.org", "mx.example.org", 25, False, False),
        ("smtp+tls://u:p%40ss@mx.example.org", "mx.example.org", 587, True, False),
        ("smtp+ssl://u:p%40ss@mx.example.org", "mx.example.org", 465, False, True),
        ("smtp://mx.example.org:2525", "mx.example.org", 2525, False, False),
    ],
)
def test_smtp_by_url(url, host, port, tls, ssl):
    loaded = values(EMAIL_URL=url)
    assert (loaded["EMAIL_HOST"], loaded["EMAIL_PORT"]) == (host, port)
    assert (loaded["EMAIL_USE_TLS"], loaded["EMAIL_USE_SSL"]) == (tls, ssl)
    login = (loaded["EMAIL_HOST_USER"], loaded["EMAIL_HOST_PASSWORD"])
    assert login == (("u", "p@ss") if "@" in url else (None, None))


def test_every_setting_in_the_namespace_is_one_of_celerys():
    """Celery would silently ignore a misspelt setting."""
    known = {name for name, _ in flatten(NAMESPACES)}
    ours = {
        name.removeprefix("CELERY_").lower() for name in dir(settings) if name.startswith("CELERY_")
    }
    # Celery's Django integration reads this setting, but Celery's list of settings lacks it.
    assert ours - known == {"db_reuse_max"}
    assert app.conf.get("CELERY_DB_REUSE_MAX") == settings.CELERY_DB_REUSE_MAX
    assert app.conf.broker_transport_options["read_timeout"] == 5
    assert app.conf.control_queue_exclusive is False


def test_queues_have_only_their_type_as_argument():
    app.loader.import_default_modules()
    assert set(app.amqp.queues) == {"mail.v1", "maintenance.v1"}
    for queue in (*app.amqp.queues.values(), DEAD_LETTERS):
        assert queue.queue_arguments == {"x-queue-type": "quorum"}
        assert (queue.exchange.name, queue.exchange.type) == ("emails", "topic")
        assert queue.routing_key == queue.name
    assert app.conf.task_default_queue == "mail.v1"


def test_lease_is_longer_than_the_task():
    assert settings.EMAILS_SENDING_LEASE_SECONDS > settings.CELERY_TASK_TIME_LIMIT
    assert settings.CELERY_TASK_SOFT_TIME_LIMIT < settings.CELERY_TASK_TIME_LIMIT


def test_tls_verifies_each_node_with_its_own_name():
    options = VerifiedTLS(ca_certs="/ca.pem")
    options["server_hostname"] = "first.example.org"  # kombu does so when it connects
    assert {**options} == {"ca_certs": "/ca.pem", "server_hostname": "first.example.org"}
    assert options["server_hostname"] is None
    loaded = values(BROKER_URL="amqps://u:p@b.example.org//", BROKER_CA_FILE="/ca.pem")
    assert loaded["CELERY_BROKER_USE_SSL"] == {"ca_certs": "/ca.pem", "server_hostname": None}
    assert "CELERY_BROKER_USE_SSL" not in values()
