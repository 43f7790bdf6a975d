"""Django's system checks of this app's settings (manage.py check)."""

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core import mail
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.mail.backends.base import BaseEmailBackend
from django.db import connection

from emails import smtp
from emails.backend import EmailBackend
from emails.conf import PREFIX, all_settings, conf, is_number


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
    mailers = getattr(settings, "MAILERS", None) if hasattr(mail, "mailers") else None
    name = f"{PREFIX}DELIVERY_BACKEND"
    if mailers is None and conf.DELIVERY_MAILER:
        message = f"{PREFIX}DELIVERY_MAILER needs MAILERS, of Django 6.1."
        return [Error(message, id="emails.E003")]
    if mailers is not None:
        name = f"{PREFIX}DELIVERY_MAILER"
        if conf.DELIVERY_MAILER not in mailers:
            message = f"{name}: expected one of MAILERS ({', '.join(mailers)}), for the workers."
            return [Error(message, id="emails.E003")]
    try:
        backend = smtp.new_backend()  # connects to nothing
    except Exception as error:  # backends raise any error for wrong settings
        return [Error(f"{name}: {type(error).__name__}: {error}", id="emails.E003")]
    if not isinstance(backend, BaseEmailBackend) or isinstance(backend, EmailBackend):
        path = f"{type(backend).__module__}.{type(backend).__qualname__}"
        message = f"{name}: expected an email backend that sends, not {path}."
        return [Error(message, id="emails.E003")]
    return []


def time_limit_errors() -> list[CheckMessage]:
    limit: Any = getattr(settings, "CELERY_TASK_TIME_LIMIT", None)
    if is_number(limit, (int, float)) and limit >= conf.SENDING_LEASE_SECONDS:
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
