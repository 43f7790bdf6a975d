"""Tests the client for the management API: it waits for a starting node, and its errors contain no passwords."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread, Timer

import pytest
from ansible_collections.django_celery.stack.plugins.module_utils import management_api
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.management_api import ManagementApi, NoAnswer, Unauthorized


class Node(BaseHTTPRequestHandler):
    """Responds with the status in the path."""

    def do_GET(self):
        status = int(self.path.rpartition("/")[2])
        self.send_response(status)
        self.end_headers()
        if status != 204:
            self.wfile.write(b'{"uri": "amqp://u:Hidden@h"}')

    do_DELETE = do_POST = do_GET

    def log_message(self, *_):
        """Logs nothing."""


@pytest.fixture
def server():
    """A server that has bound its port but does not listen yet."""
    with HTTPServer(("127.0.0.1", 0), Node, bind_and_activate=False) as server:
        server.server_bind()
        yield server
        server.shutdown()


def client(server, timeout=0.0):
    return ManagementApi(f"http://127.0.0.1:{server.server_address[1]}", "admin", "Hidden", timeout)


def listen(server):
    server.server_activate()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()


def test_waits_for_a_starting_node(server, monkeypatch):
    monkeypatch.setattr(management_api, "RETRY", 0.05)
    begin = time.monotonic()
    Timer(0.3, listen, (server,)).start()
    assert client(server, timeout=60).get("200") == {"uri": "amqp://u:Hidden@h"}
    assert time.monotonic() - begin >= 0.3


def test_failed_health_check_is_an_answer(server):
    listen(server)
    assert client(server).health("503") == {"uri": "amqp://u:Hidden@h"}
    with pytest.raises(Failure):
        client(server).health("500")
    with pytest.raises(Failure):
        client(server).get("503")


def test_empty_response_is_none(server):
    listen(server)
    assert client(server).get("204") is None


def test_only_delete_accepts_a_missing_object(server):
    listen(server)
    client(server).delete("404")
    with pytest.raises(Failure, match="answered 404"):
        client(server).get("404")
    with pytest.raises(Failure, match="answered 409"):
        client(server).delete("409")


def test_errors_have_types_and_no_passwords(server):
    listen(server)
    with pytest.raises(Unauthorized, match="rejects admin's password"):
        client(server).get("401")
    with pytest.raises(Failure, match="answered 500") as error:
        client(server).post("500", {})
    assert "amqp://u:********@h" in str(error.value)


def test_no_response_within_the_timeout_is_an_error(monkeypatch):
    api = ManagementApi("http://u:Hidden@127.0.0.1:1", "admin", "Hidden", 0)
    with pytest.raises(NoAnswer, match="does not answer") as error:
        api.get("200")
    assert "Hidden" not in str(error.value)
