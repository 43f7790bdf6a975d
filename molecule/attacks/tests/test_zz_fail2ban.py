"""fail2ban recognizes the failed logins of the application and of Flower. These tests come last, since they install fail2ban."""

from __future__ import annotations

import re

import pytest
import requests
from test_zy_sign_in import attempt

LOG = "/var/log/nginx/access.log"
FILTER = "/etc/fail2ban/filter.d/nginx-sign-in.conf"


@pytest.fixture
def proxy_with_fail2ban(run_playbook):
    """nginx with fail2ban, and with a path of Flower."""
    flower = [{"path": "/task/", "upstreams": ["127.0.0.1:5555"]}]
    done = run_playbook("playbooks/proxy.yml", nginx_fail2ban=True, nginx_locations=flower)
    assert done.returncode == 0, done.stdout + done.stderr
    yield
    done = run_playbook("playbooks/proxy.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def matched(root):
    """Returns the lines of nginx's log that match fail2ban's filter, of those that were written after the fixture was set up."""
    before = int(root(f"wc --lines <{LOG}").stdout)

    def lines():
        root(f"tail --lines=+{before + 1} {LOG} >/run/new.log")
        said = root(f"fail2ban-regex --print-all-matched --print-no-missed /run/new.log {FILTER}").stdout
        return [line for line in said.splitlines() if re.match(r"\|\s+[0-9.]+ - ", line)]

    return lines


@pytest.mark.attack(kind="sign-in")
@pytest.mark.usefixtures("proxy_with_fail2ban")
def test_fail2ban_counts_each_failed_login_and_nothing_else(root, site, variables, matched):
    root("mailroom-manage axes_reset")
    for path in ("/login/", "/admin/login/"):
        assert attempt(site, path, "admin", "wrong", {}) == 200
        assert attempt(site, path, "admin", variables["secret_app_admin_password"], {}) == 302
    for auth, status in (
        (("flower", "wrong"), 401),
        (None, 401),
        (("flower", variables["secret_flower_password"]), 404),
    ):
        answer = requests.get(f"{site}/task/none", auth=auth, headers={"Host": "mail.example.org"}, timeout=10)
        assert answer.status_code == status
    found = matched()
    assert [line.split('"')[1] for line in found] == [
        "POST /login/ HTTP/1.1",
        "POST /admin/login/ HTTP/1.1",
        "GET /task/none HTTP/1.1",
    ]
    assert " - flower [" in found[-1]
