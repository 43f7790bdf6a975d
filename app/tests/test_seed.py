"""Tests send_email and Django's mail functions, for code that does not use the tables."""

import json
import os
import secrets
import subprocess
import sys
from email.mime.image import MIMEImage
from urllib.parse import urlsplit

import psycopg
import pytest
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage, EmailMultiAlternatives, get_connection, send_mail
from django.db import transaction

from emails import messages
from emails.models import Email
from emails.tasks import deliver, send_email
from tests.tools import claim, database_url

pytestmark = pytest.mark.django_db

ARGUMENTS = ("Hello", "Body", "shop@anywhere.example", ["bob@example.org", "eve@example.org"])


def test_delay_stores_the_email_and_needs_no_broker():
    result = send_email.delay(*ARGUMENTS, html_content="<p>Body</p>")
    email = Email.objects.get()
    assert result.id == str(email.pk)
    assert (email.owner, email.sender, email.html) == (None, ARGUMENTS[2], "<p>Body</p>")
    assert [delivery.recipient for delivery in email.deliveries.all()] == ARGUMENTS[3]


def test_delay_is_part_of_the_transaction():
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        send_email.delay(*ARGUMENTS)
        raise ZeroDivisionError
    assert not Email.objects.exists()


def test_direct_call_and_single_address_work():
    email_id = send_email("Hello", "Body", None, "bob@example.org")
    email = Email.objects.get(pk=email_id)
    assert email.sender == settings.DEFAULT_FROM_EMAIL
    assert email.deliveries.get().recipient == "bob@example.org"


def test_unsupported_task_options_are_refused():
    with pytest.raises(TypeError, match="takes no countdown"):
        send_email.apply_async(ARGUMENTS, countdown=60)
    with pytest.raises(ValidationError, match="not an email address"):
        send_email.delay("Hello", "Body", None, "bob")


def test_duplicate_message_is_stored_once():
    """The messages are from another project, which publishes the task by its name."""
    for _ in range(2):
        send_email.push_request(id="4711")
        try:
            send_email.run(*ARGUMENTS)
        finally:
            send_email.pop_request()
    assert Email.objects.count() == 1


def test_send_mail_is_stored(mailbox):
    sent = send_mail("Hello", "Body", "Shop <shop@example.net>", ["Bob <bob@example.org>"])
    assert sent == 1
    email = Email.objects.get()
    assert (email.subject, email.text, email.sender) == ("Hello", "Body", "Shop <shop@example.net>")
    assert mailbox.messages == []
    deliver(email.deliveries.get().pk)
    assert mailbox.messages[0].rcpt_tos == ["bob@example.org"]


def test_all_parts_of_a_message_arrive():
    message = EmailMultiAlternatives(
        "Hello",
        "Body",
        to=["bob@example.org"],
        cc=["carl@example.org"],
        bcc=["dan@example.org"],
        reply_to=["help@example.org"],
        headers={"List-Unsubscribe": "<https://example.org/x>", "Message-ID": "<own@example.org>"},
    )
    message.attach_alternative("<img src='cid:logo'>", "text/html")
    message.attach("report.csv", "a;b", "text/csv")
    image = MIMEImage(b"\x89PNG", "png")
    image["Content-ID"] = "<logo>"
    message.attach(image)
    assert message.send() == 1

    email = Email.objects.get()
    bcc = email.deliveries.get(recipient="dan@example.org")
    claimed = claim(bcc)
    built = messages.build(claimed).message()
    assert (built["To"], built["Cc"], built["Bcc"]) == ("bob@example.org", "carl@example.org", None)
    assert built["Reply-To"] == "help@example.org"
    assert built["List-Unsubscribe"] == "<https://example.org/x>"
    assert built["Message-ID"] == claimed.message_id == f"<{email.pk}.{bcc.pk}@example.org>"
    parts = {part.get_content_type(): part for part in built.walk()}
    assert parts["text/csv"].get_payload(decode=True) == b"a;b"
    assert parts["text/csv"].get_filename() == "report.csv"
    assert parts["image/png"]["Content-ID"] == "<logo>"
    assert parts["image/png"].get_payload(decode=True) == b"\x89PNG"
    assert b"cid:logo" in parts["text/html"].get_payload(decode=True)


def test_unsupported_message_is_an_error_unless_fail_silently():
    message = EmailMultiAlternatives("Hello", "Body", to=["bob@example.org"])
    message.attach_alternative("BEGIN:VCALENDAR", "text/calendar")
    with pytest.raises(ValueError, match="text/calendar"):
        message.send()
    assert get_connection(fail_silently=True).send_messages([message]) == 0
    with pytest.raises(ValidationError):
        EmailMessage("Hello", "Body", to=["nobody"]).send()
    assert EmailMessage("Hello", "Body").send() == 0
    assert not Email.objects.exists()


PROJECT = """
import json, os
SECRET_KEY = "x"
USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", **json.loads(os.environ["DB"])}}
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "emails"]
EMAIL_BACKEND = "emails.backend.EmailBackend"
"""
USE = """
import django; django.setup()
from django.core.mail import send_mail
from django.core.management import call_command
from emails import deliveries
from emails.models import Delivery, Email
from emails.tasks import deliver
call_command("migrate", verbosity=0)
send_mail("Hello", "Body", "shop@example.net", ["bob@example.org"])
assert Email.objects.get().subject == "Hello"
assert len(deliveries.lease(9).deliveries) == 1
"""


def test_project_needs_two_lines_of_settings(tmp_path):
    url = urlsplit(database_url())
    database = {
        "NAME": f"own_{secrets.token_hex(4)}",
        **{"USER": url.username, "PASSWORD": url.password, "HOST": url.hostname, "PORT": url.port},
    }
    with psycopg.connect(os.environ["TEST_DATABASE_URL"], autocommit=True) as server:
        server.execute(f"CREATE DATABASE {database['NAME']}")
    (tmp_path / "own_settings.py").write_text(PROJECT)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{tmp_path}:{settings.BASE_DIR}",
            "DJANGO_SETTINGS_MODULE": "own_settings",
            "DB": json.dumps(database),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
