"""Adds two other methods to send email to the API of app/.

So all methods that bench/mail_compare measures have the same API keys, validation and web server.
"""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mailroom.settings")
application = get_wsgi_application()

from celery import Celery  # noqa: E402 - models need Django's setup
from django.conf import settings  # noqa: E402 - as above
from django.core.mail import send_mail  # noqa: E402 - as above
from django.core.mail.backends.smtp import EmailBackend  # noqa: E402 - as above
from emails.api import api  # noqa: E402 - as above
from emails.api_schemas import EmailIn  # noqa: E402 - as above
from ninja import Status  # noqa: E402 - as above

# As in baselines.py: Celery's defaults, not the settings of app/.
plain = Celery(
    "baselines",
    broker=os.environ["BROKER_URL"],
    set_as_current=False,
    task_default_queue="mail.baselines",
    task_default_exchange_type="topic",
)


@plain.task(name="baselines.send")
def send(subject: str, text: str, to: list[str]) -> None:
    raise NotImplementedError("no worker takes this task; only the request is measured")


@api.post("/send_mail", response={202: dict})
def by_send_mail(request, email: EmailIn):
    send_mail(email.subject, email.text, settings.DEFAULT_FROM_EMAIL, email.to, connection=EmailBackend())
    return Status(202, {})


@api.post("/delay", response={202: dict})
def by_delay(request, email: EmailIn):
    send.delay(email.subject, email.text, email.to)
    return Status(202, {})
