import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connection
from playwright.sync_api import expect, sync_playwright

from emails.models import Delivery
from emails.states import State
from tests.tools import claim, end

ARGUMENTS = [
    "--headless",
    "--no-sandbox",  # Chromium refuses its sandbox to root
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
    assert executable, "no chromium on the PATH"
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


def fail_first(answer: str = "no such user") -> None:
    """As a worker does that was refused."""
    claimed = claim(Delivery.objects.order_by("pk").first())
    end(claimed, State.FAILED, code=550, answer=answer, seconds=0.1)
    connection.close()


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

    # Counts and states are live, and so is an email's own page.
    failed = page.get_by_role("link", name="failed")
    expect(failed).to_have_text("failed 0")
    with ThreadPoolExecutor(1) as database:  # Playwright holds this thread's event loop
        database.submit(fail_first).result()
    expect(failed).to_have_text("failed 1")
    failed.click()
    expect(emails).to_have_count(1)
    emails.get_by_role("link", name="From a browser").click()
    expect(page.get_by_role("cell", name="550 no such user")).to_be_visible()
    page.get_by_role("button", name="Send once more").click()
    expect(page.get_by_role("status")).to_contain_text("Sends 1 once more.")
    expect(page.locator(".state").first).to_have_text("queued")

    page.goto(f"{live_server.url}/api/docs")
    expect(page.get_by_text("Accept an email")).to_be_visible()
    assert complaints == [], "a script, a style or an image was refused"


@pytest.mark.browser
def test_a_narrow_screen_holds_what_is_long_and_searches(live_server, accept, phone):
    with ThreadPoolExecutor(1) as database:
        database.submit(accept, subject="Other", recipients=[f"{'x' * 60}@example.org"]).result()
        database.submit(accept, subject="Long" * 60).result()
        database.submit(fail_first, "no" * 200).result()

    def fits() -> bool:
        return phone.evaluate("document.documentElement.scrollWidth") == 320

    log_in(phone, live_server.url)
    emails = phone.locator(".emails > li")
    expect(emails).to_have_count(2)
    assert fits()
    phone.get_by_role("searchbox", name="Search").fill("OTHER")
    phone.get_by_role("button", name="Search").click()
    expect(emails).to_have_count(1)
    emails.get_by_role("link", name="Other").click()
    answer = phone.locator(".answer")
    expect(answer).to_contain_text("550 nono")
    assert fits()
    wide = "element => element.scrollWidth > element.clientWidth"
    assert not phone.locator(".scroll").evaluate(wide), "the answer is read without scrolling"
