"""Fixtures for Prometheus, and for emails that are posted on the site's host."""

from __future__ import annotations

import json

import pytest
import requests


@pytest.fixture(scope="module")
def prometheus(url, variables):
    """Calls Prometheus' API; returns the data."""

    def ask(path, **parameters):
        login = ("monitoring", variables["secret_monitoring_password"])
        answer = requests.get(f"{url(9090)}/api/v1/{path}", params=parameters, auth=login, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    return ask


@pytest.fixture(scope="module")
def query(prometheus):
    return lambda expression: prometheus("query", query=expression)["result"]


# Calls the API on the host itself, since only the monitoring host reaches the web service.
CALL = """
import sys, urllib.request
path, body, key = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request("http://127.0.0.1:8000/api/" + path, body.encode() or None, headers)
print(urllib.request.urlopen(request).read().decode())
"""


@pytest.fixture(scope="module")
def call_api(host, variables):
    """Calls the application's API; returns the parsed response."""
    web = host.get_host("ansible://site1")

    def call(path, body=None):
        text = json.dumps(body) if body else ""
        return json.loads(web.check_output("python3 -c %s %s %s %s", CALL, path, text, variables["secret_app_api_key"]))

    return call


@pytest.fixture(scope="module")
def post_email(call_api):
    """Posts an email with further fields; returns its id."""
    return lambda **fields: call_api("emails", {"subject": "test", "text": "Hello.", "to": ["one@example.net"], **fields})["id"]
