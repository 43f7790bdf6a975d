import re
from datetime import timedelta

import pytest
from django.contrib.auth.models import Permission
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection
from django.test import Client
from django.utils import timezone

from emails import api_keys
from emails.models import ApiKey, Delivery, Email
from emails.states import State
from emails.tasks import deliver

pytestmark = pytest.mark.django_db

FORM = {"to": "bob@example.org, eve@example.org", "subject": "From the page", "text": "Body"}


def test_the_page_needs_a_login(client, user):
    assert client.get("/").headers["Location"] == "/login/?next=/"
    assert client.post("/", FORM).status_code == 302
    assert not Email.objects.exists()
    response = client.post("/login/", {"username": "alice", "password": "wrong"})
    assert response.status_code == 200
    response = client.post("/login/", {"username": "alice", "password": "secret"})
    assert response.headers["Location"] == "/"
    assert client.get("/").status_code == 200
    client.post("/logout/")
    assert client.get("/").status_code == 302


def test_the_form_accepts_an_email_and_the_list_shows_it(client, user):
    client.force_login(user)
    response = client.post("/", FORM, follow=True)
    assert response.redirect_chain == [("/", 302)]
    assert [d.recipient for d in Delivery.objects.all()] == ["bob@example.org", "eve@example.org"]
    page = response.content.decode()
    assert "From the page" in page
    assert '<span class="state queued">queued</span>' in page


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("to", ""),
        ("to", "bob"),
        ("to", "a@b.org " * 2 + "c@d.org e@f.org g@h.org"),
        ("subject", "\x01"),
    ],
)
def test_the_form_shows_what_is_wrong(client, user, field, value):
    client.force_login(user)
    response = client.post("/", FORM | {field: value})
    assert response.status_code == 200
    assert field in response.context["form"].errors
    assert not Email.objects.exists()


def test_the_list_is_paged_newest_first_and_private(client, accept, user, django_user_model):
    for number in range(21):
        accept(subject=f"Number {number}.")
    client.force_login(user)
    first, second = client.get("/").content.decode(), client.get("/?page=2").content.decode()
    assert first.index("Number 20.") < first.index("Number 1.")
    assert "Number 0." not in first
    assert "Number 0." in second
    client.force_login(django_user_model.objects.create_user("mallory"))
    assert "Number" not in client.get("/").content.decode()


def test_the_list_is_filtered_searched_and_counted(client, accept, user):
    for number, state in enumerate((State.SENT, State.FAILED, State.FAILED, State.UNCERTAIN)):
        accept(subject=f"Number {number}.").deliveries.update(state=state)
    accept(subject="An old one.").deliveries.update(state=State.SENT)
    Email.objects.filter(subject="An old one.").update(
        created_at=timezone.now() - timedelta(days=2)
    )
    client.force_login(user)

    def numbers(query: str) -> set[str]:
        return set(re.findall(r"Number (\d)\.", client.get(f"/{query}").content.decode()))

    assert numbers("") == {"0", "1", "2", "3"}
    assert numbers("?state=failed") == {"1", "2"}
    assert numbers("?state=failed&q=number+2") == {"2"}
    assert numbers("?q=bob@example.org") == {"0", "1", "2", "3"}
    assert numbers("?q=nobody") == set()
    assert numbers("?state=nonsense") == {"0", "1", "2", "3"}
    counts = client.get("/").context["counts"]
    assert counts == {
        **dict.fromkeys(("scheduled", "queued", "cancelled", "skipped"), 0),
        "sending": 0,
        "deferred": 0,
        "uncertain": 1,
        "sent": 1,
        "failed": 2,
    }


def test_an_emails_page_shows_attempts_and_answers_and_sends_again(client, accept, user, mailbox):
    mailbox.recipient_reply = "550 no such user here"
    email = accept()
    deliver(email.deliveries.get().pk)
    client.force_login(user)
    url = f"/emails/{email.pk}/"
    assert url in client.get("/").content.decode()
    page = client.get(url).content.decode()
    assert "no such user here" in page
    assert "550" in page
    assert '<span class="state failed">failed</span>' in page
    response = client.post(url, follow=True)
    assert "1 deliveries queued for retry." in response.content.decode()
    assert "Send once more" not in response.content.decode(), "nothing is dead any more"
    assert email.deliveries.get().state == State.QUEUED


def test_an_emails_page_is_private(client, accept, django_user_model):
    url = f"/emails/{accept().pk}/"
    assert client.get(url).status_code == 302
    client.force_login(django_user_model.objects.create_user("mallory"))
    assert client.get(url).status_code == 404
    assert client.post(url).status_code == 404


def test_the_form_tells_of_the_limit(client, user, settings):
    settings.EMAILS_RECIPIENTS_PER_HOUR = 1
    client.force_login(user)
    assert "limit of recipients" in client.post("/", FORM).content.decode()


def test_what_users_wrote_is_escaped(client, accept, user):
    accept(subject="<script>alert(1)</script>")
    client.force_login(user)
    assert "<script>alert" not in client.get("/").content.decode()


def test_a_form_without_a_csrf_token_is_refused(user):
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    assert client.post("/", FORM).status_code == 403
    assert client.post("/login/", {"username": "alice", "password": "secret"}).status_code == 403
    token = client.get("/").context["csrf_token"]
    assert client.post("/", FORM | {"csrfmiddlewaretoken": str(token)}).status_code == 302


def test_pages_allow_only_their_own_scripts_and_styles(client, user):
    client.force_login(user)
    response = client.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    page = response.content.decode()
    assert "style=" not in page
    assert "<script>" not in page


def test_healthz_tells_whether_the_database_answers(client, monkeypatch):
    assert client.get("/healthz").status_code == 200

    def refuse(*_, **__):
        raise OperationalError("gone")

    monkeypatch.setattr(connection, "cursor", refuse)
    assert client.get("/healthz").status_code == 503


def test_the_admin_shows_emails_but_does_not_change_them(admin_client, accept):
    email = accept()
    Delivery.objects.update(state=State.DEFERRED)
    assert str(email.pk) in admin_client.get("/admin/emails/email/").content.decode()
    url = f"/admin/emails/email/{email.pk}/change/"
    assert "bob@example.org" in admin_client.get(url).content.decode()
    assert admin_client.post(url, {"subject": "changed"}).status_code == 403
    assert admin_client.get("/admin/emails/email/add/").status_code == 403


def test_the_admin_replays_only_with_its_permission(client, accept, django_user_model):
    email = accept()
    email.deliveries.update(state=State.FAILED, due_at=None)
    staff = django_user_model.objects.create_user("staff", is_staff=True)
    url = "/admin/emails/delivery/"
    data = {"action": "replay", "_selected_action": [email.deliveries.get().pk]}
    client.force_login(staff)
    assert client.get(url).status_code == 403
    staff.user_permissions.add(Permission.objects.get(codename="view_delivery"))
    assert "bob@example.org" in client.get(f"{url}?state__exact=failed").content.decode()
    client.post(url, data)
    assert email.deliveries.get().state == State.FAILED
    staff.user_permissions.add(Permission.objects.get(codename="replay_delivery"))
    assert "1 deliveries queued for retry." in client.post(url, data, follow=True).content.decode()
    assert email.deliveries.get().state == State.QUEUED


def test_the_command_lists_the_dead_and_sends_them_again(accept, capsys):
    email, _ = accept(), accept()
    Delivery.objects.update(state=State.FAILED, due_at=None, last_smtp_code=550)
    call_command("replay")
    listed = capsys.readouterr().out
    assert f"{email.pk} delivery=" in listed
    assert "failed attempts=0 code=550" in listed
    assert "bob" not in listed
    call_command("replay", str(email.pk), send=True)
    assert "1 deliveries queued for retry" in capsys.readouterr().out
    assert [d.state for d in Delivery.objects.order_by("pk")] == [State.QUEUED, State.FAILED]
    call_command("replay", state="uncertain", send=True)
    assert "0 deliveries queued" in capsys.readouterr().out
    with pytest.raises(CommandError, match="ID: expected"):
        call_command("replay", "nonsense")


def test_the_admin_makes_a_key_and_shows_it_once(admin_client, user):
    response = admin_client.post(
        "/admin/emails/apikey/add/", {"owner": user.pk, "name": "shop"}, follow=True
    )
    key = str(next(iter(response.context["messages"]))).rpartition(" ")[2]
    assert api_keys.authenticate(key) == ApiKey.objects.get(name="shop")
    assert key not in admin_client.get("/admin/emails/apikey/").content.decode()
