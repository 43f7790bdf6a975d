"""Fixtures of the attacks, and the table of attacks per kind at the end of a run."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import socket
import time
from collections import Counter

import amqp
import pytest
import requests

NAME = "mail.example.org"


@pytest.fixture(scope="module")
def published(variables, forwarded):
    """Returns the port on this machine for a port of the host: nginx's published port, or an SSH tunnel to another service.

    The other services listen on the loopback address, where only an attacker who already runs programs on the host reaches them.
    """
    known = {80: variables["testbed_published"]["80"]}

    def port_here(port):
        if port not in known:
            known[port] = forwarded(port)
        return known[port]

    return port_here


@pytest.fixture(scope="module")
def doors(published):
    """The ports on this machine of the proxy and of the web service behind it."""
    return {"nginx": published(80), "gunicorn": published(8000)}


class Answer:
    """The responses on a connection: the first one parsed, and everything that the server sent."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.status, self.headers, self.body = 0, {}, b""
        with contextlib.suppress(http.client.HTTPException, ValueError):
            response = http.client.HTTPResponse(Text(data))
            response.begin()
            self.status, self.headers = response.status, response.headers
            with contextlib.suppress(http.client.HTTPException):
                self.body = response.read()

    def statuses(self) -> list[int]:
        return [int(each) for each in re.findall(rb"^HTTP/1\.[01] (\d{3})", self.data, re.MULTILINE)]


class Text:
    """Gives http.client bytes that were already read, as if they came from a socket."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self.data)


@pytest.fixture(scope="module")
def raw(doors):
    """Sends bytes to one of the ports; returns the answer when the server closes the connection or is silent for two seconds."""

    def send(door, data, silence=2.0):
        with socket.create_connection(("127.0.0.1", doors[door]), timeout=silence) as connection:
            received = b""
            with contextlib.suppress(OSError):
                connection.sendall(data)
                while more := connection.recv(65536):
                    received += more
        return Answer(received)

    return send


@pytest.fixture(scope="module")
def key(variables):
    return {"Authorization": f"Bearer {variables['secret_app_api_key']}"}


@pytest.fixture(scope="module")
def site(doors):
    return f"http://127.0.0.1:{doors['nginx']}"


@pytest.fixture(scope="module")
def post(site, key):
    """Posts an email as the administrator; returns the response."""

    def send(**fields):
        email = {"subject": "Hello", "text": "Hello.", "to": ["one@example.net"], **fields}
        return requests.post(f"{site}/api/emails", json=email, headers=key, timeout=30)

    return send


@pytest.fixture(scope="module")
def mails(variables):
    """Returns the mails in the mail catcher with this subject."""
    port = variables["testbed_mail_published"]["1080"]

    def found(subject):
        answer = requests.get(f"http://127.0.0.1:{port}/api/email", timeout=30).json()
        return [mail for mail in (answer["emails"] if isinstance(answer, dict) else answer) if mail["subject"] == subject]

    return found


@pytest.fixture(scope="module")
def sign_in(site, variables):
    """Signs the administrator in; returns the session."""

    def begin(session=None):
        session = session or requests.Session()
        page = session.get(f"{site}/login/", timeout=10)
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text).group(1)
        form = {"csrfmiddlewaretoken": token, "username": "admin", "password": variables["secret_app_admin_password"]}
        answer = session.post(f"{site}/login/", data=form, headers={"Referer": f"{site}/login/"}, timeout=10)
        assert answer.status_code == 200 and "/login" not in answer.url, answer.status_code
        return session

    return begin


@pytest.fixture(scope="module")
def signed_in(sign_in):
    """The session of the administrator; nginx limits the number of logins."""
    return sign_in()


PASSWORDS = {
    "admin": "secret_rabbitmq_administrator_password",
    "mailroom": "secret_rabbitmq_app_password",
    **{f"mailroom-{kind}": f"secret_rabbitmq_{kind}_password" for kind in ("worker", "beat", "flower", "monitoring")},
}


@pytest.fixture(scope="module")
def connect(published, variables):
    """Connects to the broker as one of its users."""

    def open_connection(user, password=None, vhost="mailroom"):
        connection = amqp.Connection(
            f"127.0.0.1:{published(5672)}",
            userid=user,
            password=variables[PASSWORDS[user]] if password is None else password,
            virtual_host=vhost,
            connect_timeout=10,
            read_timeout=10,
        )
        connection.connect()
        return connection

    return open_connection


@pytest.fixture
def journal(root):
    """Returns the entries in the host's journal since the test began."""
    # The option --since gets whole seconds.
    time.sleep(1)
    begin = root("date +%s").stdout.strip()
    return lambda *words: root(f"journalctl --no-pager --output=cat --since=@{begin} {' '.join(words)}").stdout


# ---- The table ----

PASSED: Counter[str] = Counter()
OTHERS: Counter[str] = Counter()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("attack")
    if mark and (report.when == "call" or report.outcome == "failed"):
        (PASSED if report.passed else OTHERS)[mark.kwargs["kind"]] += 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("attacks that failed, by kind")
    for kind in sorted(PASSED | OTHERS):
        others = f", {OTHERS[kind]} succeeded or could not run" if OTHERS[kind] else ""
        terminalreporter.line(f"{PASSED[kind]:>5}  {kind}{others}")
    terminalreporter.line(f"{PASSED.total():>5}  attacks of {len(PASSED)} kinds")
