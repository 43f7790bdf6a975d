"""Tests the application behind nginx on the same host."""

from __future__ import annotations

import re

import pytest
import requests


@pytest.fixture(scope="module")
def proxy(url):
    return url(80)


def test_email_is_accepted_through_the_proxy(proxy, variables):
    key = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}
    # The attachment is larger than nginx's default limit.
    attachment = {"filename": "a.txt", "content": "QUJD" * 2**20, "content_type": "text/plain"}
    email = {"subject": "Hello", "text": "Hello.", "to": ["somebody@example.net"], "attachments": [attachment]}
    assert requests.post(f"{proxy}/api/emails", json=email, headers=key, timeout=20).status_code == 202


def test_static_file_of_the_release_comes_from_nginx(proxy):
    sheet = re.search(r'href="(/static/[^"]+\.css)"', requests.get(f"{proxy}/login/", timeout=5).text)[1]
    answer = requests.get(f"{proxy}{sheet}", timeout=5)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/css"
    # WhiteNoise would respond with another value.
    assert answer.headers["Cache-Control"] == "public, max-age=60"
    assert answer.headers["Content-Encoding"] == "gzip"


def test_nginx_reads_nothing_else_of_the_release(host):
    user = "nginx" if host.exists("dnf") else "www-data"
    with host.sudo():
        readable = f"cd / && runuser -u {user} -- find /opt/mailroom/releases/*/"
        assert host.run(f"{readable}manage.py -readable").stdout == ""
        assert host.run(f"{readable}environment -follow -readable").stdout == ""
        assert host.run(f"{readable} -maxdepth 1").stderr != ""
        static = host.check_output("realpath /opt/mailroom/current/staticfiles")
        assert host.check_output(f"cd / && runuser -u {user} -- find {static} -not -readable") == ""
        # Ansible created no other path in the release that others can read.
        found = host.check_output(f"find $(realpath /opt/mailroom/current) -not -type l -perm /o=rwx -not -path '{static}*'")
    assert found == static.rsplit("/", 1)[0]


def test_metrics_are_closed(proxy, variables):
    token = {"Authorization": f"Bearer {variables['secret_app_metrics_token']}"}
    assert requests.get(f"{proxy}/metrics", headers=token, timeout=5).status_code == 404


def test_attempts_to_log_in_are_limited(proxy):
    statuses = [requests.get(f"{proxy}/login/", timeout=5).status_code for _ in range(40)]
    assert statuses[0] == 200
    assert statuses[-1] == 429
