"""Attacks on passwords. nginx limits the rate of logins, so these tests come after those that sign in."""

from __future__ import annotations

import re

import pytest
import requests


@pytest.fixture
def reset(root):
    """Deletes the counts of failed logins before and after a test."""
    root("mailroom-manage axes_reset")
    yield
    root("mailroom-manage axes_reset")


def attempt(base, path, name, password, headers):
    session = requests.Session()
    session.headers.update({"Host": "mail.example.org", **headers})
    page = session.get(f"{base}{path}", timeout=10)
    found = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
    if found is None:
        return page.status_code
    form = {"csrfmiddlewaretoken": found[1], "username": name, "password": password, "next": "/"}
    answer = session.post(f"{base}{path}", data=form, headers={"Referer": f"{base}{path}"}, timeout=10, allow_redirects=False)
    return answer.status_code


SPOOFED = [
    {},
    {"X-Forwarded-For": "192.0.2.{}"},
    {"X-Real-IP": "192.0.2.{}"},
    {"Forwarded": "for=192.0.2.{}"},
    {"X-Client-IP": "192.0.2.{}"},
    {"True-Client-IP": "192.0.2.{}"},
    {"User-Agent": "agent {}"},
]


@pytest.mark.attack(kind="sign-in")
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        pytest.param("/admin/login/", {}, id="admin"),
        *(pytest.param("/login/", headers, id=next(iter(headers), "page")) for headers in SPOOFED),
    ],
)
@pytest.mark.usefixtures("reset")
def test_password_cannot_be_guessed(site, variables, path, headers):
    for number in range(12):
        own = {name: value.format(number) for name, value in headers.items()}
        assert attempt(site, path, "admin", f"wrong {number}", own) in (200, 403, 429)
    own = {name: value.format(99) for name, value in headers.items()}
    assert attempt(site, path, "admin", variables["secret_app_admin_password"], own) in (403, 429)


@pytest.mark.attack(kind="sign-in")
@pytest.mark.parametrize("name", ["admin", "ADMIN", "admin ", "admin\0", "' OR '1'='1", "nobody", "", "a" * 10_000, "\uff41dmin"])
@pytest.mark.usefixtures("reset")
def test_wrong_name_or_password_signs_nobody_in(url, name):
    assert attempt(url(8000), "/login/", name, "' OR '1'='1", {}) in (200, 400)


WEAK = ["short", "password1234", "123456789012", "qwertyuiop12", "aaaaaaaaaaa", ""]


@pytest.mark.attack(kind="sign-in")
@pytest.mark.parametrize("password", WEAK)
def test_weak_password_is_refused(root, password):
    code = (
        "from django.contrib.auth.password_validation import validate_password as v; "
        "from django.core.exceptions import ValidationError as E\\n"
        f"try:\\n  v({password!r}); print(chr(97) + 1 * chr(98))\\nexcept E: print(chr(99) + chr(100))"
    )
    done = root(f'mailroom-manage shell -c "$(printf "{code}")" | tail -n 1')
    assert done.stdout.strip() == "cd", done.stdout + done.stderr


@pytest.mark.attack(kind="sign-in")
@pytest.mark.parametrize(
    "path", ["/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks", "/api/queues/length", "/api/task/info/x"]
)
@pytest.mark.parametrize("auth", [None, ("flower", ""), ("flower", "flower"), ("admin", "admin"), ("", "")], ids=range(5))
def test_flower_is_closed(url, path, auth):
    answer = requests.get(f"{url(5555)}{path}", auth=auth, timeout=10, allow_redirects=False)
    assert answer.status_code == 401


CHANGES = [
    "worker/shutdown/{}",
    "worker/pool/restart/{}",
    "worker/pool/grow/{}?n=100",
    "worker/pool/autoscale/{}?min=0&max=0",
    "worker/queue/add-consumer/{}?queue=x",
    "worker/queue/cancel-consumer/{}?queue=mail.v1",
    "task/revoke/{}?terminate=true",
    "task/rate-limit/emails.tasks.deliver?ratelimit=0",
    "task/timeout/emails.tasks.deliver?hard=1",
    "task/async-apply/emails.tasks.deliver",
    "task/apply/emails.tasks.purge",
    "task/send-task/emails.tasks.deliver",
    "task/abort/{}",
]


@pytest.mark.attack(kind="Flower")
@pytest.mark.parametrize("path", CHANGES)
def test_flower_changes_nothing_even_with_its_password(url, variables, root, path):
    name = root("echo mail@$(hostname)").stdout.strip()
    login = ("flower", variables["secret_flower_password"])
    before = root("systemctl show --property=MainPID --value mailroom-worker@mail").stdout
    answer = requests.post(f"{url(5555)}/api/{path.format(name)}", auth=login, json={"args": [[1]]}, timeout=20)
    assert answer.status_code in (400, 403, 404, 405, 503), answer.text[:300]
    assert root("systemctl show --property=MainPID --value mailroom-worker@mail").stdout == before


@pytest.mark.attack(kind="Flower")
@pytest.mark.parametrize(
    "path", ["/worker/<script>alert(1)</script>", "/task/<script>alert(1)</script>", "/static/../../../etc/passwd"]
)
def test_flower_shows_neither_scripts_nor_files(raw_flower, path):
    text = raw_flower(path)
    assert "<script>alert(1)" not in text and "root:x:0" not in text


@pytest.fixture
def raw_flower(url, variables):
    def ask(path):
        login = ("flower", variables["secret_flower_password"])
        prepared = requests.Request("GET", url(5555), auth=login).prepare()
        prepared.url = url(5555) + path
        with requests.Session() as session:
            return session.send(prepared, timeout=10).text

    return ask
