"""Tests on running gunicorn and Django that clients can't forge log entries."""

import os
import re
import subprocess
import sys
from http.client import HTTPConnection, HTTPResponse

import pytest
from django.conf import settings

from tests.harness import GUNICORN, Process, eventually, free_port, is_healthy
from tests.tools import database_url

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def web(tmp_path, request):
    """Two functions: one sends a request to the web server, one returns the server's log lines."""
    port, log = free_port(), tmp_path / "log"
    environment = {
        "PATH": os.environ["PATH"],
        "SECRET_KEY": "only-for-tests",
        "HTTPS_ONLY": getattr(request, "param", "false"),
        "ALLOWED_HOSTS": "127.0.0.1",
        "DATABASE_URL": database_url(),
    }
    # The error pages refer to static files.
    environment["STATIC_ROOT"] = str(tmp_path / "static")
    collect = [sys.executable, "manage.py", "collectstatic", "-v0", "--no-input"]
    subprocess.run(collect, cwd=settings.BASE_DIR, env=environment, check=True)

    def respond(path: str, **headers: str) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers=headers)
        return connection.getresponse()

    def send(path: str, **headers: str) -> int:
        return respond(path, **headers).status

    send.respond = respond

    command = (*GUNICORN, f"--bind=127.0.0.1:{port}", "mailroom.wsgi:application")
    with Process(command, environment, log) as process:
        process.wait_until(lambda: is_healthy(port))
        yield send, lambda: log.read_text().splitlines()


@pytest.mark.attack(kind="HTTP: log forging")
def test_path_cannot_forge_a_log_entry(web):
    send, lines = web
    forged = "2026-11-26 00:00:00,000 INFO emails.services: accepted".replace(" ", "%20")
    for separator in ("%0a", "%0d", "%e2%80%a8", "%c2%85", "%0b", "%1b%5b31m"):
        assert send(f"/a{separator}{forged}") == 404
    found = lines()
    assert [line for line in found if "FORGED" in line or "accepted" in line]
    assert not [line for line in found if line.startswith("2026-11-26 00:00:00")]
    assert not [line for line in found if re.search(r"[\x00-\x1f\x7f\x85\u2028]", line)]


@pytest.mark.attack(kind="HTTP: log forging")
def test_request_for_an_unknown_host_is_one_line(web):
    send, lines = web
    assert send("/", Host="evil.example.com") == 400

    def of_request() -> list[str]:
        return [each for each in lines() if "evil.example.com" in each or '"GET /" 400' in each]

    eventually(lambda: len(of_request()) == 2)  # one line of Django, one of gunicorn
    assert "Traceback" not in "".join(lines())


def test_the_access_log_has_no_query_and_no_referrer(web):
    send, lines = web
    send("/accounts/?q=bob@example.org", Referer="http://x/?q=carol@example.org")
    eventually(lambda: [line for line in lines() if '"GET /accounts/"' in line])
    assert "example.org" not in "".join(lines())


@pytest.mark.parametrize("web", ["true"], indirect=True)
def test_https_only_redirects_and_sends_hsts(web):
    send, _ = web
    plain = send.respond("/login/", Host="127.0.0.1")
    assert (plain.status, plain.headers["Location"]) == (301, "https://127.0.0.1/login/")
    assert send("/healthz") == 200, "the load balancer's check must work without TLS"
    # There is no METRICS_TOKEN.
    assert send("/metrics") == 404, "Prometheus must not be redirected"
    secure = send.respond("/login/", **{"X-Forwarded-Proto": "https"})
    assert secure.headers["Strict-Transport-Security"] == "max-age=2592000"
