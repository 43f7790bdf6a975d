"""Tests emails from Django's mail functions and from the task, and the admin's read-only parts."""

import pytest
from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage, get_connection

from emails.models import Email
from emails.tasks import send_email

pytestmark = pytest.mark.django_db


def test_list_of_emails_is_stored_completely_or_not_at_all():
    good = EmailMessage("Hello", "Body", None, ["bob@example.org"])
    bad = EmailMessage("Hello", "Body", None, ["no address"])
    with pytest.raises(ValidationError):
        get_connection().send_messages([good, bad])
    assert not Email.objects.exists()
    assert get_connection().send_messages([good, good]) == 2


def test_recipients_of_the_projects_emails_see_each_other():
    both = ["bob@example.org", "carol@example.org"]
    EmailMessage("Hello", "Body", None, both).send()
    send_email.delay("Hello", "Body", None, both)
    assert list(Email.objects.values_list("show_recipients", flat=True)) == [True, True]


def test_admin_cannot_delete_emails(admin_client, accept):
    email = accept()
    url = f"/admin/emails/email/{email.pk}/delete/"
    assert admin_client.post(url, {"post": "yes"}).status_code == 403
    chosen = {"action": "delete_selected", "_selected_action": [str(email.pk)], "post": "yes"}
    admin_client.post("/admin/emails/email/", chosen)
    assert Email.objects.filter(pk=email.pk).exists()


def test_admin_cannot_change_the_owner_of_a_key(admin_client, api_key, other_user):
    url = f"/admin/emails/apikey/{api_key.pk}/change/"
    admin_client.post(url, {"owner": other_user.pk, "name": "other", "revoked": "on"})
    owner, name = api_key.owner, api_key.name
    api_key.refresh_from_db()
    assert (api_key.owner, api_key.name, api_key.revoked) == (owner, name, True)
