"""Tests the system checks for the settings of the app emails."""

import json
import re
from types import SimpleNamespace

import pytest
from django.conf import settings as project
from django.core import mail
from django.core.checks import run_checks
from django.core.mail.backends.base import BaseEmailBackend
from django.core.mail.backends.locmem import EmailBackend as Memory

from emails import checks
from emails.backend import EmailBackend
from emails.conf import all_settings

SMTP = "django.core.mail.backends.smtp.EmailBackend"
DOCUMENT = project.BASE_DIR.parent / "docs/emails-in-your-project.md"


def errors() -> list[tuple[str, str]]:
    return [(each.id, each.msg) for each in run_checks() if each.id.startswith("emails.")]


def test_settings_of_this_project_are_valid():
    assert errors() == []


def test_defaults_are_valid():
    assert [each.name for each in all_settings() if each.check(each.default)] == []


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("ALLOWED_SENDERS", "@example.org", "a list of addresses and @domains in lower case"),
        ("ALLOWED_SENDERS", ["example.org"], "a list of addresses and @domains in lower case"),
        ("ALLOWED_SENDERS", ["Me@example.org"], "a list of addresses and @domains in lower case"),
        ("MAX_RECIPIENTS", 0, "a whole number, 1 or more"),
        ("MAX_RECIPIENTS", "50", "a whole number, 1 or more"),
        ("MAX_RECIPIENTS", True, "a whole number, 1 or more"),
        ("API_DOCS_PUBLIC", "no", "True or False"),
        ("MAX_ATTACHMENTS", -1, "a whole number, 0 or more"),
        ("MAX_EMAIL_BYTES", 1e6, "a whole number, 1 or more"),
        ("MAX_BATCH", 0, "a whole number, 1 or more"),
        ("RECIPIENTS_PER_HOUR", None, "a whole number, 0 or more"),
        ("DELIVERY_BACKEND", Memory, "a string"),
        ("DELIVERY_MAILER", None, "a string"),
        ("DELIVERY_TIMEOUT", 0, "a number of seconds, 0.1 or more"),
        ("DEADLINE_SECONDS", 0, "a number of seconds, 1 or more"),
        ("RETRY_SECONDS", float("nan"), "a number of seconds, 0.1 or more"),
        ("RETRY_SECONDS", float("inf"), "a number of seconds, 0.1 or more"),
        ("UNCERTAIN_POLICY", "ask", "'resend' or 'hold'"),
        ("SENDING_LEASE_SECONDS", 1, "a number of seconds, 5 or more"),
        ("SMTP_CONNECTIONS", -1, "a whole number, 0 or more"),
        ("DOMAIN_LIMITS", ["example.org"], "a dictionary of domain"),
        ("DOMAIN_LIMITS", {"Example.org": {"concurrent": 1}}, "a dictionary of domain"),
        ("DOMAIN_LIMITS", {"example.org": {}}, "a dictionary of domain"),
        ("DOMAIN_LIMITS", {"example.org": {"concurrent": 0.5}}, "a dictionary of domain"),
        ("DOMAIN_LIMITS", {"example.org": {"per_minute": 0}}, "a dictionary of domain"),
        ("DOMAIN_LIMITS", {"example.org": {"per_minute": float("inf")}}, "a dictionary of domain"),
        ("DOMAIN_LIMITS", {"*": {"per_minute": float("nan")}}, "a dictionary of domain"),
        ("RELAY_POLL_SECONDS", 0, "a number of seconds, 0.05 or more"),
        ("RELAY_THREADS", 0, "a whole number, 1 or more"),
        ("RETENTION_DAYS", 0.5, "a whole number, 1 or more"),
        ("METRICS_TOKEN", None, "a string"),
    ],
)
def test_invalid_value_is_reported_with_the_allowed_ones(settings, name, wrong, expected):
    setattr(settings, f"EMAILS_{name}", wrong)
    ((identity, message),) = errors()
    assert identity == "emails.E001"
    assert message.startswith(f"EMAILS_{name}: expected {expected}")


def test_unknown_name_is_refused(settings):
    settings.EMAILS_MAX_RECIPIENT = 5
    assert errors() == [("emails.E002", "EMAILS_MAX_RECIPIENT is not a setting of the app emails.")]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no.such.Backend", "ModuleNotFoundError: No module named 'no'"),
        ("emails.backend.EmailBackend", "expected an email backend that sends"),
        ("emails.conf.Conf", "expected an email backend that sends"),
    ],
)
def test_delivery_backend_must_send(settings, path, reason):
    settings.EMAILS_DELIVERY_BACKEND = path
    ((identity, message),) = errors()
    assert identity == "emails.E003"
    assert message.startswith(f"EMAILS_DELIVERY_BACKEND: {reason}")


def test_delivery_backend_with_contradictory_settings_is_refused(settings):
    settings.EMAILS_DELIVERY_BACKEND = SMTP
    settings.EMAIL_USE_TLS = settings.EMAIL_USE_SSL = True
    ((identity, message),) = errors()
    assert (identity, "mutually exclusive" in message) == ("emails.E003", True)


def test_delivery_mailer_needs_mailers(settings):
    """Django before 6.1 ignores MAILERS."""
    settings.MAILERS = {"smtp": {}}
    assert errors() == []
    settings.EMAILS_DELIVERY_MAILER = "smtp"
    assert errors() == [("emails.E003", "EMAILS_DELIVERY_MAILER needs MAILERS, of Django 6.1.")]


@pytest.mark.parametrize(
    ("alias", "reason"),
    [
        ("smtp", None),
        ("", "expected one of MAILERS (default, smtp)"),
        ("mail", "expected one of MAILERS (default, smtp)"),
        ("default", "expected an email backend that sends"),
    ],
)
def test_delivery_mailer_must_send(settings, monkeypatch, alias, reason):
    """Imitates Django 6.1, which the scenario any-project uses."""
    mailers: dict[str, BaseEmailBackend] = {"default": EmailBackend(), "smtp": Memory()}
    monkeypatch.setattr(mail, "mailers", mailers, raising=False)
    settings.MAILERS = dict.fromkeys(mailers, {})
    settings.EMAILS_DELIVERY_MAILER = alias
    found = errors()
    if reason is None:
        assert found == []
    else:
        ((identity, message),) = found
        assert identity == "emails.E003"
        assert message.startswith(f"EMAILS_DELIVERY_MAILER: {reason}")


@pytest.mark.parametrize(("limit", "allowed"), [(None, True), (149, True), (150, False)])
def test_lease_must_be_longer_than_the_time_limit(settings, limit, allowed):
    settings.CELERY_TASK_TIME_LIMIT = limit
    settings.EMAILS_SENDING_LEASE_SECONDS = 150
    message = (
        f"CELERY_TASK_TIME_LIMIT is {limit}: expected less than EMAILS_SENDING_LEASE_SECONDS, 150."
    )
    assert errors() == ([] if allowed else [("emails.E004", message)])


def test_other_databases_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "connection", SimpleNamespace(vendor="sqlite"))
    assert errors() == [
        ("emails.E005", "DATABASES['default'] is sqlite: the app emails needs PostgreSQL.")
    ]


def test_document_lists_every_setting_with_its_default():
    listed = re.findall(r"^\| `(EMAILS_\w+)` \| `(.*?)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert listed == [(each.name, json.dumps(each.default)) for each in all_settings()]
