"""Runs the module rabbitmq_definitions against a small server that imitates the management API."""

from __future__ import annotations

import base64
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.module_utils import broker as brokers
from ansible_collections.django_celery.stack.plugins.module_utils.password_hash import password_matches
from ansible_collections.django_celery.stack.plugins.modules import rabbitmq_definitions
from broker_model import deleted, hash_of, imported
from helpers import executable

ADMINISTRATOR, PASSWORD, NEW = "admin", "Secret-of-the-administrator", "Secret-that-is-new"


class Api:
    """Imitates the part of a broker's API that the module uses, and records the requests."""

    def __init__(self, folder):
        self.definitions = {"users": [{"name": ADMINISTRATOR, "password_hash": hash_of(PASSWORD)}], "vhosts": []}
        self.flags = {"old": "enabled", "new": "disabled", "newer than this node": "unavailable"}
        self.queues, self.connections = {}, {}
        self.machine_version = 4
        self.gone, self.requests, self.refusal, self.imported = set(), [], None, folder / "imported.json"

    def administrators_hash(self):
        """The hash that rabbitmqctl has imported, or None."""
        source = json.loads(self.imported.read_text()) if self.imported.exists() else self.definitions
        return {user["name"]: user["password_hash"] for user in source["users"]}[ADMINISTRATOR]

    def answer(self, method, below, authorization, body):
        self.requests.append(method if below == "definitions" else f"{method} {below}")
        name, _, password = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        user = {"password_hash": self.administrators_hash(), "hashing_algorithm": "rabbit_password_hashing_sha256"}
        if name != ADMINISTRATOR or not password_matches(password, user):
            return 401, {"error": "not_authorized"}
        if self.refusal and method == "POST":
            return self.refusal
        if method == "POST":
            self.definitions = imported(self.definitions, json.loads(body))
            return 204, None
        if method == "DELETE":
            if below in self.gone:
                return 404, {"error": "Object Not Found"}
            self.definitions = deleted(self.definitions, below)
            return 204, None
        if method == "PUT":
            self.flags[unquote(below.split("/")[1])] = "enabled"
            return 204, None
        what, *names = map(unquote, below.partition("?")[0].split("/"))
        if what == "feature-flags":
            return 200, [{"name": name, "state": state, "stability": "stable"} for name, state in self.flags.items()]
        if below.startswith("queues/quorum/"):
            return 200, [{"Machine Version": self.machine_version}]
        if what == "queues" and not names:
            return 200, [{"vhost": "app", "name": "mail", "type": "quorum"}, {"vhost": "app", "name": "other", "type": "classic"}]
        if what == "queues":
            return 200, self.queues.get(names[0], [])
        if what == "exchanges":
            return 200, [{"name": ""}, {"name": "amq.direct"}]
        if what == "vhosts":
            return 200, self.connections.get(names[0], [])
        return 200, self.definitions


@pytest.fixture
def api(tmp_path, monkeypatch):
    api = Api(tmp_path)
    api.flags["new"] = "enabled"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = api.answer(self.command, self.path.removeprefix("/api/"), self.headers["Authorization"], body)
            text = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_):
            """Logs nothing."""

    executable(
        tmp_path / "bin/rabbitmqctl",
        # The machine version of the node's quorum queues.
        "import sys\nif 'eval' in sys.argv:\n    print(4)\n    sys.exit()\n"
        f"open({str(tmp_path / 'argv')!r}, 'w').write(repr(sys.argv))\n"
        f"open({str(api.imported)!r}, 'w').write(open(sys.argv[-1]).read())\n",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        api.url = f"http://127.0.0.1:{server.server_port}"
        yield api
        server.shutdown()


@pytest.fixture
def run(capsys, tmp_path):
    """Runs the module as Ansible does, with the definitions file of the role; returns its result."""

    def run(url, password=PASSWORD, check=False, **wanted):
        definitions = tmp_path / "definitions.json"
        definitions.write_text(json.dumps({"users": [{"name": ADMINISTRATOR, "password_hash": hash_of(password)}]}))
        arguments = {"url": url, "administrator": ADMINISTRATOR, "password": password, "timeout": 0, **wanted}
        arguments["definitions"] = str(definitions)
        with patch_module_args({**arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit):
            rabbitmq_definitions.main()
        output = capsys.readouterr().out
        assert password not in output
        return json.loads(output)

    return run


WORKER = {"name": "worker", "password": "Secret-of-the-worker", "permissions": [{"vhost": "app", "read": ".*"}]}


LOOK = ["GET", "GET feature-flags"]


def test_definitions_are_read_again_after_one_import(api, run):
    wanted = {"vhosts": [{"name": "app"}], "users": [WORKER]}
    first = run(api.url, **wanted)
    assert first["changed"]
    assert first["diff"]["after"]["vhost app"] == {"description": "", "default_queue_type": "quorum"}
    assert WORKER["password"] not in json.dumps(first)
    assert api.requests == [*LOOK, "POST", "GET"]
    assert not run(api.url, **wanted)["changed"]
    assert api.requests == [*LOOK, "POST", "GET", *LOOK]


def test_check_mode_compares_and_changes_nothing(api, run):
    result = run(api.url, check=True, vhosts=[{"name": "app"}])
    assert result["changed"]
    assert "vhost app" in result["diff"]["after"]
    assert api.requests == LOOK


def test_stable_feature_flags_are_enabled(api, run):
    api.flags["new"] = "disabled"
    checked = run(api.url, check=True)
    assert checked["changed"]
    assert checked["diff"]["after"] == {"feature flag new": "enabled"}
    assert api.flags["new"] == "disabled"
    assert run(api.url)["changed"]
    assert api.flags == {"old": "enabled", "new": "enabled", "newer than this node": "unavailable"}
    assert not run(api.url)["changed"]


def test_feature_flags_wait_for_the_machine_version_of_quorum_queues(api, run, monkeypatch):
    monkeypatch.setattr(brokers, "CURRENT", 0)
    api.flags["new"] = "disabled"
    api.machine_version = 3
    result = run(api.url)
    assert result["failed"]
    assert "The feature flags new are not enabled" in result["msg"]
    assert "mail in app" in result["msg"]
    assert api.flags["new"] == "disabled"


def test_guest_is_deleted(api, run):
    api.definitions["users"].append({"name": "guest", "tags": ["administrator"], "password_hash": ""})
    assert run(api.url)["removed"] == ["user guest"]
    assert not run(api.url)["changed"]


def test_purge_keeps_a_nonempty_virtual_host_unless_it_is_listed(api, run, monkeypatch):
    warned = []
    # Ansible returns warnings in different forms, depending on the modules that are loaded.
    monkeypatch.setattr(rabbitmq_definitions.UnloggedModule, "warn", lambda _, text: warned.append(text))
    api.definitions["vhosts"] += [{"name": name} for name in ("a/b", "empty", "in use", "app")]
    api.queues["a/b"] = [{"name": "q", "messages": 3}]
    api.connections["in use"] = [{}]
    wanted = {"vhosts": [{"name": "app", "default_queue_type": "quorum"}], "purge": True}
    checked = run(api.url, check=True, **wanted)
    assert checked["removed"] == ["vhost empty"]
    assert len(warned) == 2
    assert "List it in rabbitmq_purge_vhosts to delete it." in warned[0]
    first = run(api.url, **wanted)
    assert first["removed"] == ["vhost empty"]
    assert first["kept"] == [
        "vhost a/b is not listed and stays: it has 1 queues, 3 messages.",
        "vhost in use is not listed and stays: it has 1 connections.",
    ]
    assert not run(api.url, **wanted)["changed"]
    assert run(api.url, **wanted, purge_vhosts=["a/b"])["removed"] == ["vhost a/b"]
    assert [vhost["name"] for vhost in api.definitions["vhosts"]] == ["in use", "app"]


def test_objects_that_an_import_ignores_are_an_error(api, run, monkeypatch):
    """Exported definitions lack a transient queue, and the import does not change it."""
    monkeypatch.setitem(globals(), "imported", lambda actual, _: actual)
    monkeypatch.setattr(brokers.time, "sleep", lambda _: None)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(brokers.time, "monotonic", lambda: next(clock))
    result = run(api.url, queues=[{"vhost": "app", "name": "q"}])
    assert result["failed"]
    assert "these objects still differ: queue q in app. A transient or exclusive queue or exchange" in result["msg"]


def test_conflict_is_an_error_before_any_request(api, run):
    api.definitions["exchanges"] = [
        {"vhost": "app", "name": "e", "type": "direct", "durable": True, "auto_delete": False, "internal": False, "arguments": {}}
    ]
    for check in (True, False):
        result = run(api.url, check=check, vhosts=[{"name": "new"}], exchanges=[{"vhost": "app", "name": "e"}])
        assert result["failed"]
        assert 'exchange e in app exists with {"type": "direct"} and can\'t be changed to {"type": "topic"}' in result["msg"]
    assert "POST" not in api.requests


def test_passwords_in_parameters_are_never_printed(api, run, capsys):
    uri = "amqp://someone:{}@localhost"
    was = {"component": "shovel", "vhost": "app", "name": "s", "value": {"src-uri": uri.format("HiddenBefore")}}
    api.definitions["parameters"] = [was]
    result = run(api.url, parameters=[{**was, "value": {"src-uri": uri.format("HiddenAfter")}}])
    assert result["changed"]
    assert api.definitions["parameters"][0]["value"]["src-uri"] == uri.format("HiddenAfter")
    # The result contains the module's arguments, which Ansible prints with -vvv.
    assert "invocation" in result
    assert "Hidden" not in json.dumps(result)


def test_rejected_administrator_is_set_by_rabbitmqctl(api, run, tmp_path):
    result = run(api.url, password=NEW, vhosts=[{"name": "app"}])
    assert result["changed"]
    assert result["diff"]["after"][f"user {ADMINISTRATOR}"] == {"password": "as wanted"}
    assert api.requests == ["GET", *LOOK, "POST", "GET"]
    # The command line has the file's name, and neither the password nor its hash.
    words = ["--quiet", "import_definitions", str(tmp_path / "definitions.json")]
    assert (tmp_path / "argv").read_text() == repr([str(tmp_path / "bin/rabbitmqctl"), *words])
    assert not run(api.url, password=NEW, vhosts=[{"name": "app"}])["changed"]


def test_check_mode_sets_no_administrator(api, run, tmp_path):
    assert run(api.url, password=NEW, check=True)["changed"]
    assert not (tmp_path / "argv").exists()


def test_error_of_rabbitmqctl_is_quoted(api, run, tmp_path):
    executable(tmp_path / "bin/rabbitmqctl", "import sys; sys.exit('the cookie is another')")
    result = run(api.url, password=NEW)
    assert result["failed"]
    assert "the cookie is another" in result["msg"]


def test_administrator_rejected_twice_is_an_error(api, run, tmp_path):
    executable(tmp_path / "bin/rabbitmqctl", "")
    result = run(api.url, password=NEW)
    assert result["failed"]
    assert f"rejects {ADMINISTRATOR} even after" in result["msg"]


def test_error_of_the_api_is_quoted(api, run):
    api.refusal = 400, {"reason": "delivery-limit must be a number"}
    result = run(api.url, policies=[{"vhost": "/", "name": "p", "pattern": "", "definition": {"delivery-limit": "x"}}])
    assert result["failed"]
    assert "answered 400" in result["msg"]
    assert "delivery-limit must be a number" in result["msg"]


def test_unavailable_broker_fails_a_run_but_not_check_mode(api, run):
    # Nothing listens on port 1.
    down = "http://127.0.0.1:1"
    result = run(down)
    assert result["failed"]
    assert f"{down} does not answer" in result["msg"]
    checked = run(down, check=True)
    assert not checked.get("failed")
    assert checked["changed"]
    assert "not compared" in checked["msg"]


def test_password_is_sent_to_no_proxy(api, run, monkeypatch):
    seen = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_error(502)

        def log_message(self, *_):
            """Logs nothing."""

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        result = run(api.url)
        proxy.shutdown()
    assert not result.get("failed"), result
    assert seen == []


# The password of an invalid URI can't be parsed, because it contains characters that must be quoted.
@pytest.mark.parametrize("password", ["HiddenUri", "Hidden@Uri", "Hidden/Uri"])
def test_errors_do_not_contain_a_password_of_a_uri(api, run, password):
    uri = f"amqp://someone:{password}@localhost"
    api.refusal = 400, {"reason": f"Validation failed: {uri} is no URI"}
    result = run(api.url, parameters=[{"component": "shovel", "vhost": "app", "name": "s", "value": {"src-uri": uri}}])
    assert result["failed"]
    assert "amqp://someone:********@localhost is no URI" in result["msg"]
    assert "Hidden" not in json.dumps(result)


def test_errors_do_not_contain_a_password_that_only_the_broker_has(api, run):
    api.refusal = 400, {"reason": "amqp://someone:HiddenUri@localhost"}
    result = run(api.url, vhosts=[{"name": "app"}])
    assert "amqp://someone:********@localhost" in result["msg"]
    assert "Hidden" not in json.dumps(result)


def test_deletion_of_a_missing_user_succeeds(api, run):
    """Another run or an operator could delete the user between the comparison and the request."""
    api.definitions["users"].append({"name": "guest", "tags": [], "password_hash": ""})
    api.gone = {"users/guest"}
    delete = Api.answer

    def answer(method, below, *words):
        if method == "DELETE":
            api.definitions = deleted(api.definitions, below)
        return delete(api, method, below, *words)

    api.answer = answer
    result = run(api.url)
    assert not result.get("failed"), result
    assert result["removed"] == ["user guest"]
    assert "DELETE users/guest" in api.requests


def test_response_that_is_not_json_is_an_error(api, run, monkeypatch):
    monkeypatch.setattr(api, "answer", lambda *_: (200, b"<html>"))
    result = run(api.url)
    assert result["failed"]
    assert "did not answer GET definitions with JSON" in result["msg"]


def test_missing_rabbitmqctl_is_an_error(api, run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    result = run(api.url, password=NEW)
    assert result["failed"]
    assert "rabbitmqctl can't set the administrator" in result["msg"]
