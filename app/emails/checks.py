"""Django's system checks of this app's settings (manage.py check)."""

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.mail.backends.base import BaseEmailBackend
from django.db import connection
from django.utils.module_loading import import_string

from emails.conf import PREFIX, all_settings, conf

OWN_BACKEND = "emails.backend.EmailBackend"


@register(Tags.compatibility)
def check_settings(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    errors: list[CheckMessage] = []
    known = {setting.name for setting in all_settings()}
    for name in dir(settings):
        if name.startswith(PREFIX) and name not in known:
            errors.append(Error(f"{name} is not a setting of the app emails.", id="emails.E002"))
    for setting in all_settings():
        expected = setting.check(getattr(settings, setting.name, setting.default))
        if expected:
            errors.append(Error(f"{setting.name}: expected {expected}.", id="emails.E001"))
    if errors:
        return errors
    return [*delivery_errors(), *time_limit_errors()]


def delivery_errors() -> list[CheckMessage]:
    mailers = getattr(settings, "MAILERS", None)
    if mailers is None:
        name, path = f"{PREFIX}DELIVERY_BACKEND", conf.DELIVERY_BACKEND
        if conf.DELIVERY_MAILER:
            hint = f"{PREFIX}DELIVERY_MAILER needs MAILERS, of Django 6.1."
            return [Error(hint, id="emails.E003")]
    else:
        name = f"{PREFIX}DELIVERY_MAILER"
        if conf.DELIVERY_MAILER not in mailers:
            hint = f"{name}: expected one of MAILERS ({', '.join(mailers)}), which workers send by."
            return [Error(hint, id="emails.E003")]
        path = mailers[conf.DELIVERY_MAILER].get(
            "BACKEND", "django.core.mail.backends.smtp.EmailBackend"
        )
    try:
        backend = import_string(path)
    except ImportError:
        backend = None
    is_backend = isinstance(backend, type) and issubclass(backend, BaseEmailBackend)
    if not is_backend or path == OWN_BACKEND:
        hint = f"{name}: expected an email backend that is installed, other than {OWN_BACKEND}."
        return [Error(hint, id="emails.E003")]
    return []


def time_limit_errors() -> list[CheckMessage]:
    limit = getattr(settings, "CELERY_TASK_TIME_LIMIT", None)
    if limit is not None and limit >= conf.SENDING_LEASE_SECONDS:
        message = (
            f"CELERY_TASK_TIME_LIMIT is {limit}: expected less than "
            f"{PREFIX}SENDING_LEASE_SECONDS, {conf.SENDING_LEASE_SECONDS:g}."
        )
        return [Error(message, id="emails.E004")]
    return []


@register(Tags.compatibility)
def check_database(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    if connection.vendor != "postgresql":
        message = f"DATABASES['default'] is {connection.vendor}: the app emails needs PostgreSQL."
        return [Error(message, id="emails.E005")]
    return []
