"""A Django project in one file.

The project sends email by the methods that bench/mail_compare compares with app/. The code follows the methods' documentation.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from urllib.parse import urlsplit

import django
from celery import Celery, shared_task
from django.conf import settings

database = urlsplit(os.environ["DATABASE_URL"])
settings.configure(
    SECRET_KEY="only-for-measurements",  # noqa: S106 - protects nothing
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "post_office"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": database.path[1:],
            "USER": database.username,
            "PASSWORD": database.password,
            "HOST": database.hostname,
            "PORT": database.port,
            "CONN_MAX_AGE": 60,
        }
    },
    EMAIL_HOST="127.0.0.1",
    EMAIL_PORT=int(os.environ["SMTP_PORT"]),
    EMAIL_TIMEOUT=10,
    POST_OFFICE={"CELERY_ENABLED": False, "MAX_RETRIES": 10, "RETRY_INTERVAL": timedelta(seconds=2)},
)
django.setup()

from django.core.handlers.wsgi import WSGIHandler  # noqa: E402 - imports need the settings
from django.core.mail import send_mail  # noqa: E402 - as above
from django.http import JsonResponse  # noqa: E402 - as above
from django.urls import path  # noqa: E402 - as above

# Celery's defaults, except for the names that the broker's user may use and the exchange type: for a direct exchange, Celery would
# publish to the default exchange, which that user may not use.
names = {"task_default_queue": "mail.baselines", "task_default_exchange_type": "topic"}
app = Celery("baselines", broker=os.environ["BROKER_URL"], **names)
app.set_default()


@shared_task(name="baselines.send")
def send(subject: str, text: str, to: list[str]) -> None:
    send_mail(subject, text, "mailroom@localhost", to)


def by_send_mail(request):
    email = json.loads(request.body)
    send_mail(email["subject"], email["text"], "mailroom@localhost", email["to"])
    return JsonResponse({}, status=202)


def by_delay(request):
    email = json.loads(request.body)
    send.delay(email["subject"], email["text"], email["to"])
    return JsonResponse({}, status=202)


def by_post_office(request):
    from post_office import mail

    email = json.loads(request.body)
    mail.send(email["to"], "mailroom@localhost", subject=email["subject"], message=email["text"])
    return JsonResponse({}, status=202)


urlpatterns = [path("send_mail", by_send_mail), path("delay", by_delay), path("post_office", by_post_office)]
application = WSGIHandler()

if __name__ == "__main__":
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
