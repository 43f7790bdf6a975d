import html
import re
from datetime import UTC, datetime, timedelta

import pytest
from django.contrib.auth.models import Permission
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection
from django.template.loader import render_to_string
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.html import strip_tags

from emails import api_keys, listing, views
from emails.models import ApiKey, Delivery, Email
from emails.states import State
from emails.tasks import deliver
from emails.validation import File
from tests.tools import claim, end

pytestmark = pytest.mark.django_db


def refuse(*_, **__):
    raise OperationalError("gone")


FORM = {"to": "bob@example.org, eve@example.org", "subject": "From the page", "text": "Body"}


def test_page_requires_a_login(client, user):
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


def test_form_accepts_an_email_and_the_list_shows_it(client, user):
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
def test_form_shows_errors(client, user, field, value):
    client.force_login(user)
    response = client.post("/", FORM | {field: value})
    assert response.status_code == 200
    assert field in response.context["form"].errors
    assert not Email.objects.exists()


def test_list_is_paged_newest_first_and_private(client, accept, user, django_user_model):
    for number in range(21):
        accept(subject=f"Number {number}.")
    client.force_login(user)
    first = client.get("/?q=number").content.decode()
    assert first.index("Number 20.") < first.index("Number 1.")
    assert "Number 0." not in first
    older = html.unescape(re.search(r'href="([^"]*)" rel="next"', first)[1])
    second = client.get(f"/{older}").content.decode()
    assert "Number 0." in second
    assert "Number 1." not in second
    assert 'rel="next"' not in second
    assert 'href="?q=number">Newest' in second
    assert client.get("/?before=nonsense").content.decode().count("Number") == 20
    client.force_login(django_user_model.objects.create_user("mallory"))
    assert "Number" not in client.get("/").content.decode()


def test_list_is_filtered_searched_and_counted(client, accept, user):
    for number, state in enumerate((State.SENT, State.FAILED, State.FAILED, State.UNCERTAIN)):
        accept(subject=f"Number {number}.").deliveries.update(state=state)
    accept(subject="Number 4.", recipients=["a@b.org", "c@d.org"]).deliveries.update(
        state=State.SENT
    )
    Email.objects.filter(subject="Number 4.").update(created_at=timezone.now() - timedelta(days=2))
    client.force_login(user)

    def numbers(query: str) -> set[str]:
        return set(re.findall(r"Number (\d)\.", client.get(f"/{query}").content.decode()))

    assert numbers("") == {"0", "1", "2", "3", "4"}
    assert numbers("?state=failed") == {"1", "2"}
    assert numbers("?state=failed&q=number+2") == {"2"}
    assert numbers("?q=bob@example.org") == {"0", "1", "2", "3"}
    assert numbers("?q=nobody") == set()
    assert numbers("?state=nonsense") == {"0", "1", "2", "3", "4"}
    for query, all_, sent in (("", "5", "2"), ("?q=.org", "5", "2"), ("?q=bob", "4", "1")):
        counts = client.get(f"/{query}").context["counts"]
        assert (counts[""], counts["sent"], counts["failed"]) == (all_, sent, "2"), query
        for state, count in counts.items():
            assert len(numbers(f"{query or '?'}&state={state}")) == int(count), (query, state)


def test_counts_stop_at_the_limit(client, accept, user, monkeypatch):
    monkeypatch.setattr(listing, "COUNT_LIMIT", 2)
    for number in range(4):
        accept(subject=f"Number {number}.")
    assert listing.count_by_state(user)["queued"] == 3, "the count must stop at the limit"
    client.force_login(user)
    page = client.get("/")
    counts = page.context["counts"]
    assert (counts[""], counts["queued"], counts["sent"]) == ("2+", "2+", "0")
    assert "<b>2+</b>" in page.content.decode()
    found = client.get("/?q=number").context["counts"]
    assert (found[""], found["queued"], found["sent"]) == ("2+", "", "")
    found = client.get("/?q=number+1").context["counts"]
    assert (found[""], found["queued"], found["sent"]) == ("1", "1", "0")


def test_pages_do_not_read_long_columns_that_they_do_not_show(client, accept, user):
    file = File("a.txt", "text/plain", b"content")
    email = accept(html="<p>Body</p>", attachments=[file])
    client.force_login(user)
    for url in ("/", f"/emails/{email.pk}/"):
        with CaptureQueriesContext(connection) as queries:
            client.get(url)
        for query in queries:
            columns = re.sub(r"\([^()]*\)", "", query["sql"].partition(" FROM ")[0])
            assert not re.search('"(text|html|content)"(?! =)', columns)


def test_page_of_an_email_shows_attempts_and_replies_and_retries(client, accept, user, mailbox):
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
    assert "Send again" in page
    assert client.post(url).status_code == 400
    response = client.post(url, {"action": "replay"}, follow=True)
    assert "1 delivery queued for retry." in response.content.decode()
    assert "Send again" not in response.content.decode(), "the button must disappear"
    assert email.deliveries.get().state == State.QUEUED


@pytest.mark.attack(kind="HTTP: objects of other users")
def test_page_of_an_email_is_private(client, accept, django_user_model):
    url = f"/emails/{accept().pk}/"
    assert client.get(url).status_code == 302
    client.force_login(django_user_model.objects.create_user("mallory"))
    assert client.get(url).status_code == 404
    assert client.post(url, {"action": "replay"}).status_code == 404


def test_email_can_be_cancelled_before_it_is_sent(client, accept, user):
    email = accept(recipients=["bob@example.org", "eve@example.org", "dan@example.org"])
    email.deliveries.filter(recipient="eve@example.org").update(state=State.SENDING)
    client.force_login(user)
    url = f"/emails/{email.pk}/"
    assert 'value="cancel"' in client.get(url).content.decode()
    page = client.post(url, {"action": "cancel"}, follow=True).content.decode()
    assert "2 deliveries cancelled." in page
    assert 'value="cancel"' not in page
    states = [delivery.state for delivery in email.deliveries.all()]
    assert states == [State.CANCELLED, State.SENDING, State.CANCELLED]


@pytest.mark.parametrize(
    ("by", "attempted", "said"),
    [("deadline", False, "deadline"), ("deadline", True, "deadline"), ("server", True, "refused")],
)
def test_failure_reason_is_shown_once(client, accept, user, by, attempted, said):
    email = accept()
    if attempted:
        claimed = claim(email.deliveries.get())
        end(claimed, State.FAILED, code=450, answer="greylisted", failed_by=by)
    else:
        email.deliveries.update(state=State.FAILED, failed_by=by, due_at=None)
    client.force_login(user)
    for url in (f"/emails/{email.pk}/", "/"):
        page = client.get(url).content.decode()
        assert [word for word in ("deadline", "refused") if word in page] == [said]
        assert page.count(said) == 1
        assert page.count("greylisted") == int(attempted)


def test_waiting_delivery_shows_its_next_attempt(client, accept, user):
    email = accept()
    client.force_login(user)
    later = datetime(2099, 5, 4, 3, 2, 1, tzinfo=UTC)

    def pages(**values) -> list[str]:
        email.deliveries.update(**values)
        return [
            " ".join(strip_tags(client.get(url).content.decode()).split())
            for url in ("/", f"/emails/{email.pk}/")
        ]

    for page in pages(state=State.DEFERRED, due_at=later):
        assert "Next attempt: 4 May 2099, 03:02:01 UTC" in page
    for page in pages(state=State.DEFERRED, due_at=datetime(1970, 1, 1, tzinfo=UTC)):
        assert "Next attempt: now" in page
        assert "1970" not in page
    listed, shown = pages(state=State.UNCERTAIN, due_at=None)
    assert "Next attempt" not in listed + shown
    assert "not sent again unless" in shown
    scheduled = {"delivery": Delivery(state="scheduled", due_at=later)}
    text = strip_tags(render_to_string("emails/due.html", scheduled)).strip()
    assert text == "To be sent 4 May 2099, 03:02:01 UTC"


def test_page_of_an_email_shows_its_text(client, accept, user, monkeypatch):
    email = accept(text="Dear <b>Bob</b>,\nhello")
    client.force_login(user)
    page = client.get(f"/emails/{email.pk}/").content.decode()
    assert "Dear &lt;b&gt;Bob&lt;/b&gt;,\nhello</div>" in page
    assert "beginning" not in page
    assert "<iframe" not in page
    assert client.get(f"/emails/{email.pk}/html").status_code == 404
    monkeypatch.setattr(views, "TEXT_LIMIT", 4)
    page = client.get(f"/emails/{email.pk}/").content.decode()
    assert "Dear</div>" in page
    assert "Only the beginning is shown." in page


@pytest.mark.attack(kind="HTTP: scripts in pages")
def test_html_of_an_email_is_sandboxed_and_private(client, accept, user, django_user_model):
    email = accept(html="<script>alert(1)</script><p>Body</p>")
    page_url, url = f"/emails/{email.pk}/", f"/emails/{email.pk}/html"
    assert client.get(url).status_code == 302
    client.force_login(user)
    page = client.get(page_url).content.decode()
    assert f'<iframe src="{url}" sandbox ' in page
    assert "alert(1)" not in page
    response = client.get(url)
    assert response.content.decode() == "<script>alert(1)</script><p>Body</p>"
    policy = response.headers["Content-Security-Policy"].split("; ")
    assert {"sandbox", "default-src 'none'", "img-src data:", "frame-ancestors 'self'"} <= set(
        policy
    )
    assert response.headers["X-Frame-Options"] == "SAMEORIGIN"
    client.force_login(django_user_model.objects.create_user("mallory"))
    assert client.get(url).status_code == 404


def test_error_pages_use_the_sites_layout(client, user, monkeypatch):
    client.force_login(user)
    missing = client.get("/nowhere/")
    assert missing.status_code == 404
    refused = Client(enforce_csrf_checks=True).post("/login/", {"username": "alice"})
    assert refused.status_code == 403
    with monkeypatch.context() as patch:
        patch.setattr(connection, "cursor", refuse)
        client.raise_request_exception = False
        broken = client.get("/")
    assert broken.status_code == 500
    titles = {missing: "Not found", refused: "Form expired", broken: "Server error"}
    for page, title in titles.items():
        text = page.content.decode()
        assert f"<h1>{title}</h1>" in text
        assert "/static/emails/style" in text
        assert 'href="/"' in text


def test_api_documentation_links_to_the_site(client):
    page = client.get("/api/docs").content.decode()
    assert '<a class="link" href="/">Back to Mailroom</a>' in page


def test_admin_has_the_sites_name(admin_client):
    page = admin_client.get("/admin/").content.decode()
    assert "<title>Administration | Mailroom</title>" in page
    assert re.search(r'id="site-name"><a href="/admin/">Mailroom</a>', page)
    assert '<a href="/">View site</a>' in page


def test_form_shows_the_limit_error(client, user, settings):
    settings.EMAILS_RECIPIENTS_PER_HOUR = 1
    client.force_login(user)
    assert "limit of recipients" in client.post("/", FORM).content.decode()


@pytest.mark.attack(kind="HTTP: scripts in pages")
def test_user_input_is_escaped(client, accept, user):
    accept(subject="<script>alert(1)</script>")
    client.force_login(user)
    assert "<script>alert" not in client.get("/").content.decode()


@pytest.mark.attack(kind="HTTP: CSRF")
def test_form_without_a_csrf_token_is_refused(user):
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


def test_healthz_reports_whether_the_database_responds(client, monkeypatch):
    assert client.get("/healthz").status_code == 200
    monkeypatch.setattr(connection, "cursor", refuse)
    assert client.get("/healthz").status_code == 503


def test_admin_shows_emails_read_only(admin_client, accept):
    email = accept()
    Delivery.objects.update(state=State.DEFERRED)
    assert str(email.pk) in admin_client.get("/admin/emails/email/").content.decode()
    url = f"/admin/emails/email/{email.pk}/change/"
    assert "bob@example.org" in admin_client.get(url).content.decode()
    assert admin_client.post(url, {"subject": "changed"}).status_code == 403
    assert admin_client.get("/admin/emails/email/add/").status_code == 403


def test_admin_replays_only_with_the_permission(client, accept, django_user_model):
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
    page = client.post(url, data, follow=True).content.decode()
    assert "1 delivery queued for retry." in page
    assert email.deliveries.get().state == State.QUEUED


def test_replay_command_lists_and_retries_failed_deliveries(accept, capsys):
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


def test_admin_creates_a_key_and_shows_it_once(admin_client, user):
    response = admin_client.post(
        "/admin/emails/apikey/add/", {"owner": user.pk, "name": "shop"}, follow=True
    )
    key = str(next(iter(response.context["messages"]))).rpartition(" ")[2]
    assert api_keys.authenticate(key) == ApiKey.objects.get(name="shop")
    assert key not in admin_client.get("/admin/emails/apikey/").content.decode()
