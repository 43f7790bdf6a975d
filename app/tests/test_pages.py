import pytest
from django.db import OperationalError, connection
from django.test import Client

from emails.models import ApiKey, Delivery, Email, State

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


def test_the_admin_makes_a_key_and_shows_it_once(admin_client, user):
    response = admin_client.post(
        "/admin/emails/apikey/add/", {"owner": user.pk, "name": "shop"}, follow=True
    )
    key = str(next(iter(response.context["messages"]))).rpartition(" ")[2]
    assert ApiKey.authenticate(key) == ApiKey.objects.get(name="shop")
    assert key not in admin_client.get("/admin/emails/apikey/").content.decode()
