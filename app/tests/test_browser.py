import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from django.db import connection
from playwright.sync_api import expect, sync_playwright

from emails.models import Delivery, Email
from emails.states import State
from tests.tools import claim, end

ARGUMENTS = [
    "--headless",
    "--no-sandbox",  # Chromium's sandbox does not work for root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def browser():
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    assert executable, "no Chromium on the PATH"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_context().new_page()
    page.set_default_timeout(15_000)
    return page


@pytest.fixture
def phone(browser):
    size = {"width": 320, "height": 640}
    page = browser.new_context(is_mobile=True, viewport=size).new_page()
    page.set_default_timeout(15_000)
    return page


@pytest.fixture
def elsewhere():
    """A web server of another site: its `url` and the requested paths."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.requests.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()
    server.server_close()


def log_in(page, url: str) -> None:
    page.goto(url)
    page.get_by_label("Username").fill("alice")
    page.get_by_label("Password").fill("secret")
    page.get_by_role("button", name="Log in").click()


def send(page, subject: str) -> None:
    page.get_by_label("To").fill("bob@example.org")
    page.get_by_label("Subject").fill(subject)
    page.get_by_label("Message").fill("Body")
    page.get_by_role("button", name="Send").click()


def in_thread(act):
    """Runs `act` in another thread, because Playwright's event loop forbids queries in its own."""

    def run():
        try:
            return act()
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def fail_first(answer: str = "no such user") -> None:
    """Marks a delivery as failed, as a worker does after a refusal."""
    delivery = claim(Delivery.objects.order_by("pk").first())
    end(delivery, State.FAILED, code=550, answer=answer, seconds=0.1)


@pytest.mark.browser
def test_log_in_send_and_see_it_in_the_list(live_server, user, page):
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(error.message))
    log_in(page, live_server.url)
    send(page, "From a browser")
    expect(page.get_by_role("status")).to_contain_text("Accepted")
    emails = page.locator(".emails > li")
    expect(emails).to_have_count(1)
    expect(emails).to_contain_text("From a browser")
    expect(emails).to_contain_text("bob@example.org")
    expect(emails.locator(".state")).to_have_text("queued")

    other_tab = page.context.new_page()
    other_tab.goto(live_server.url)
    page.get_by_label("Subject").fill("Half-written")
    send(other_tab, "From another tab")
    expect(emails.first).to_contain_text("From another tab")
    expect(page.get_by_label("Subject")).to_have_value("Half-written")

    # Counts and states are refreshed on the list and on an email's page.
    failed = page.get_by_role("link", name="failed")
    expect(failed).to_have_text("failed 0")
    in_thread(fail_first)
    expect(failed).to_have_text("failed 1")
    failed.click()
    expect(emails).to_have_count(1)
    emails.get_by_role("link", name="From a browser").click()
    expect(page.get_by_role("cell", name="550 no such user")).to_be_visible()
    page.get_by_role("button", name="Send again").click()
    expect(page.get_by_role("status")).to_contain_text("1 delivery queued for retry.")
    expect(page.locator(".state").first).to_have_text("queued")

    page.goto(f"{live_server.url}/api/docs")
    expect(page.get_by_text("Accept an email")).to_be_visible()
    page.get_by_role("link", name="Back to Mailroom").click()
    expect(emails).to_have_count(2)
    assert complaints == [], "the browser blocked a script, a style or an image"


@pytest.mark.browser
def test_long_content_fits_a_narrow_screen_and_search_works(live_server, accept, phone):
    in_thread(lambda: accept(subject="Other", recipients=[f"{'x' * 60}@example.org"]))
    in_thread(lambda: accept(subject="Long" * 60))
    in_thread(lambda: fail_first("no" * 200))

    def fits() -> bool:
        return phone.evaluate("document.documentElement.scrollWidth") == 320

    def top(element) -> float:
        return element.bounding_box()["y"]

    log_in(phone, live_server.url)
    emails = phone.locator(".emails > li")
    expect(emails).to_have_count(2)
    assert fits()
    new = phone.get_by_role("heading", name="New email")
    assert top(new) > top(emails.last), "the list must come before the form"
    phone.get_by_role("link", name="New email").click()
    expect(new).to_be_in_viewport()
    phone.get_by_label("To").fill("bob")
    phone.get_by_label("Subject").fill("Typed")
    phone.get_by_label("Message").fill("Body")
    phone.get_by_role("button", name="Send").click()
    expect(phone.locator(".field .error")).to_be_visible()
    assert top(new) < top(emails.first), "the form must come first while it has errors"
    phone.get_by_role("searchbox", name="Search").fill("OTHER")
    phone.get_by_role("button", name="Search").click()
    expect(emails).to_have_count(1)
    emails.get_by_role("link", name="Other").click()
    answer = phone.locator(".answer")
    expect(answer).to_contain_text("550 nono")
    assert fits()
    wide = "element => element.scrollWidth > element.clientWidth"
    assert not phone.locator(".scroll").evaluate(wide), "the answer must fit without scrolling"


@pytest.mark.browser
def test_times_are_in_the_browsers_time_zone(live_server, accept, user, browser):
    accepted = datetime(2026, 1, 31, 20, 45, 1, tzinfo=UTC)
    in_thread(lambda: (accept(), Email.objects.update(created_at=accepted)))
    context = browser.new_context(timezone_id="Asia/Kolkata")
    page = context.new_page()
    log_in(page, live_server.url)
    time = page.locator(".emails time")
    expect(time).to_have_text("1 Feb 2026, 02:15:01 GMT+5:30", timeout=1500)  # before a refresh
    expect(time).to_have_attribute("title", "31 Jan 2026, 20:45:01 UTC")
    page.evaluate("document.querySelector('.emails').remove()")
    expect(time).to_have_text("1 Feb 2026, 02:15:01 GMT+5:30")  # after a refresh too
    plain = browser.new_context(
        java_script_enabled=False, storage_state=context.storage_state()
    ).new_page()
    plain.goto(live_server.url)
    expect(plain.locator(".emails time")).to_have_text("31 Jan 2026, 20:45:01 UTC")


@pytest.mark.browser
def test_html_of_an_email_runs_and_loads_nothing(live_server, accept, user, page, elsewhere):
    html = (
        f"<style>@import '{elsewhere.url}/css'; p {{ color: rgb(1, 2, 3) }}</style>"
        f"<p id=text>Styled</p><img src='{elsewhere.url}/pixel'>"
        f"<iframe src='{elsewhere.url}/frame'></iframe>"
        "<script>document.getElementById('text').textContent = 'Run'</script>"
        f"<a href='{elsewhere.url}/link'>Follow</a>"
    )
    email = in_thread(lambda: accept(html=html))
    log_in(page, live_server.url)
    page.goto(f"{live_server.url}/emails/{email.pk}/")
    expect(page.locator(".text")).to_have_text("Body")
    frame = page.frame_locator(".card iframe")
    text = frame.locator("#text")
    expect(text).to_have_text("Styled")
    expect(text).to_have_css("color", "rgb(1, 2, 3)")
    frame.get_by_role("link", name="Follow").click()
    expect(text).to_have_count(0)  # the frame shows that the link is blocked
    page.goto(f"{live_server.url}/emails/{email.pk}/html")
    expect(page.locator("#text")).to_have_text("Styled")
    page.wait_for_load_state("networkidle")
    assert elsewhere.requests == []
