"""The module rabbitmq_objects: what differs, and how it talks to a management API that is a small server of ours."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from ansible.module_utils.testing import patch_module_args
from helpers import executable, load
from hypothesis import given
from hypothesis import strategies as st

objects = load("roles/rabbitmq/library/rabbitmq_objects.py")

ADMINISTRATOR, PASSWORD, NEW = "admin", "Secret-of-the-administrator", "Secret-that-is-new"


def hash_of(password, algorithm="sha256", salt=b"salt"):
    return base64.b64encode(salt + hashlib.new(algorithm, salt + password.encode()).digest()).decode()


# What a broker has after definitions were sent to it

KEYS = {"vhosts": ("name",), "users": ("name",), "permissions": ("user", "vhost"), "policies": ("vhost", "name")}


def imported(actual, sent):
    """RabbitMQ's import: each object of the definitions replaces the one of the same key, and the rest stays."""
    result = {}
    for kind, keys in KEYS.items():
        found = {tuple(entry[key] for key in keys): entry for entry in [*actual.get(kind, []), *sent.get(kind, [])]}
        result[kind] = list(found.values())
    return result


NAMES = st.sampled_from(["a", "b", "c/d", "e f"])
TEXT = st.text(max_size=5)
SECRETS = st.builds("Secret-{}".format, TEXT)
TAGS = st.lists(st.sampled_from(["administrator", "monitoring", "management"]), unique=True)
PATTERNS = st.sampled_from(["", ".*", "^a$"])


def records(*keys, **fields):
    """Lists of objects with the given fields; no two have the same key."""
    return st.lists(st.fixed_dictionaries(fields), max_size=3, unique_by=lambda entry: tuple(entry[key] for key in keys))


WANTED = st.fixed_dictionaries(
    {
        "vhosts": records(
            "name",
            name=NAMES,
            description=st.none() | TEXT,
            default_queue_type=st.sampled_from([None, "classic", "quorum", "stream"]),
        ),
        "users": records(
            "name",
            name=NAMES,
            password=SECRETS,
            tags=TAGS,
            permissions=records("vhost", vhost=NAMES, configure=PATTERNS, write=PATTERNS, read=st.none() | PATTERNS),
        ),
        "policies": records(
            "vhost",
            "name",
            vhost=NAMES,
            name=NAMES,
            pattern=PATTERNS,
            apply_to=st.sampled_from([None, "all", "queues"]),
            priority=st.none() | st.integers(0, 9),
            definition=st.dictionaries(NAMES, st.integers() | TEXT, max_size=2),
        ),
    }
)
ACTUAL = st.fixed_dictionaries(
    {
        "vhosts": records(
            "name",
            name=NAMES,
            metadata=st.fixed_dictionaries({"description": TEXT, "tags": TAGS}),
            default_queue_type=st.sampled_from(["classic", "undefined"]),
        ),
        "users": records(
            "name",
            name=NAMES,
            # Old brokers write tags as one string.
            tags=TAGS | TAGS.map(",".join),
            password_hash=SECRETS.map(hash_of) | st.just(""),
            hashing_algorithm=st.sampled_from(["rabbit_password_hashing_sha256", "rabbit_password_hashing_md5"]),
            limits=st.just({}),
        ),
        "permissions": records("user", "vhost", user=NAMES, vhost=NAMES, configure=PATTERNS, write=PATTERNS, read=PATTERNS),
        "policies": st.just([]),
    }
)


@given(ACTUAL, WANTED)
def test_what_is_sent_makes_it_so_and_nothing_more_is_to_be_done(actual, wanted):
    sent, before, after = objects.differences(actual, wanted)
    assert before.keys() == after.keys()
    assert bool(sent) == bool(after)
    assert objects.differences(imported(actual, sent), wanted) == ({}, {}, {})


@given(WANTED, st.randoms(use_true_random=False))
def test_the_order_of_lists_means_nothing(wanted, random):
    actual = imported({}, objects.differences({}, wanted)[0])
    for entries in [*actual.values(), *(user["tags"] for user in actual["users"])]:
        random.shuffle(entries)
    assert objects.differences(actual, wanted) == ({}, {}, {})


@given(ACTUAL, WANTED)
def test_what_is_shown_holds_no_secret(actual, wanted):
    sent, before, after = objects.differences(actual, wanted)
    shown = json.dumps([before, after])
    secrets = [user["password"] for user in wanted["users"]] + [user["password_hash"] for user in actual["users"]]
    secrets += [user["password_hash"] for user in sent.get("users", [])]
    assert not [secret for secret in secrets if secret and secret in shown]


def test_what_is_not_listed_is_left_alone():
    actual = {"users": [{"name": "by hand", "tags": [], "password_hash": ""}], "vhosts": [{"name": "/"}]}
    assert objects.differences(actual, {"vhosts": [], "users": [], "policies": []}) == ({}, {}, {})


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_password_is_known_by_its_hash(algorithm):
    user = {"password_hash": hash_of("right", algorithm), "hashing_algorithm": f"rabbit_password_hashing_{algorithm}"}
    assert objects.password_matches("right", user)
    assert not objects.password_matches("wrong", user)


@pytest.mark.parametrize(
    "user",
    [
        {"password_hash": hash_of("right"), "hashing_algorithm": "rabbit_password_hashing_md5"},
        {"password_hash": hash_of("right")},
        {"password_hash": "", "hashing_algorithm": "rabbit_password_hashing_sha256"},
        {},
    ],
)
def test_a_hash_of_another_form_is_no_match(user):
    assert not objects.password_matches("right", user)


def test_the_example_of_rabbitmqs_page_on_passwords():
    user = {
        "password_hash": "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR",
        "hashing_algorithm": "rabbit_password_hashing_sha256",
    }
    assert objects.password_matches("test12", user)


# The management API


class Api:
    """A broker's definitions behind HTTP, and what was asked."""

    def __init__(self, folder):
        self.definitions = {"users": [{"name": ADMINISTRATOR, "password_hash": hash_of(PASSWORD)}]}
        self.requests, self.refusal, self.imported = [], None, folder / "imported.json"

    def administrators_hash(self):
        """The one that rabbitmqctl imported, if it did."""
        source = json.loads(self.imported.read_text()) if self.imported.exists() else self.definitions
        return {user["name"]: user["password_hash"] for user in source["users"]}[ADMINISTRATOR]

    def answer(self, method, authorization, body):
        self.requests.append(method)
        name, _, password = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        user = {"password_hash": self.administrators_hash(), "hashing_algorithm": "rabbit_password_hashing_sha256"}
        if name != ADMINISTRATOR or not objects.password_matches(password, user):
            return 401, {"error": "not_authorized"}
        if self.refusal and method == "POST":
            return self.refusal
        if method == "POST":
            self.definitions = imported(self.definitions, json.loads(body))
            return 204, None
        return 200, self.definitions


@pytest.fixture
def api(tmp_path, monkeypatch):
    api = Api(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = api.answer(self.command, self.headers["Authorization"], body)
            text = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *_):
            """Says nothing."""

    executable(
        tmp_path / "bin/rabbitmqctl",
        f"import sys\nopen({str(tmp_path / 'argv')!r}, 'w').write(repr(sys.argv))\n"
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
    """Runs the module as Ansible runs it, with the file that the role has written by then, and gives its answer."""

    def run(url, password=PASSWORD, check=False, **wanted):
        definitions = tmp_path / "definitions.json"
        definitions.write_text(json.dumps({"users": [{"name": ADMINISTRATOR, "password_hash": hash_of(password)}]}))
        arguments = {"url": url, "administrator": ADMINISTRATOR, "password": password, "timeout": 0, **wanted}
        arguments["definitions"] = str(definitions)
        with patch_module_args({**arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit):
            objects.main()
        output = capsys.readouterr().out
        assert password not in output
        return json.loads(output)

    return run


WORKER = {"name": "worker", "password": "Secret-of-the-worker", "permissions": [{"vhost": "app", "read": ".*"}]}


def test_two_requests_make_it_so_and_one_finds_it_so(api, run):
    wanted = {"vhosts": [{"name": "app"}], "users": [WORKER]}
    first = run(api.url, **wanted)
    assert first["changed"]
    assert first["diff"]["after"]["vhost app"] == {"description": "", "default_queue_type": "quorum"}
    assert WORKER["password"] not in json.dumps(first)
    assert api.requests == ["GET", "POST"]
    assert not run(api.url, **wanted)["changed"]
    assert api.requests == ["GET", "POST", "GET"]


def test_check_mode_compares_and_sends_nothing(api, run):
    result = run(api.url, check=True, vhosts=[{"name": "app"}])
    assert result["changed"]
    assert "vhost app" in result["diff"]["after"]
    assert api.requests == ["GET"]


def test_an_administrator_whom_the_broker_refuses_is_set_by_the_cookie(api, run, tmp_path):
    result = run(api.url, password=NEW, vhosts=[{"name": "app"}])
    assert result["changed"]
    assert result["diff"]["after"][f"user {ADMINISTRATOR}"] == {"password": "as wanted"}
    assert api.requests == ["GET", "GET", "POST"]
    # The command line names the file; neither the password nor its hash is on it.
    words = ["--quiet", "import_definitions", str(tmp_path / "definitions.json")]
    assert (tmp_path / "argv").read_text() == repr([str(tmp_path / "bin/rabbitmqctl"), *words])
    assert not run(api.url, password=NEW, vhosts=[{"name": "app"}])["changed"]


def test_check_mode_sets_no_administrator(api, run, tmp_path):
    assert run(api.url, password=NEW, check=True)["changed"]
    assert not (tmp_path / "argv").exists()


def test_a_rabbitmqctl_that_fails_is_quoted(api, run, tmp_path):
    executable(tmp_path / "bin/rabbitmqctl", "import sys; sys.exit('the cookie is another')")
    result = run(api.url, password=NEW)
    assert result["failed"]
    assert "the cookie is another" in result["msg"]


def test_a_refusal_that_stays_is_told(api, run, tmp_path):
    executable(tmp_path / "bin/rabbitmqctl", "")
    result = run(api.url, password=NEW)
    assert result["failed"]
    assert f"refuses {ADMINISTRATOR}" in result["msg"]


def test_an_error_of_the_api_gives_its_reason(api, run):
    api.refusal = 400, {"reason": "delivery-limit must be a number"}
    result = run(api.url, policies=[{"vhost": "/", "name": "p", "pattern": "", "definition": {"delivery-limit": "x"}}])
    assert result["failed"]
    assert "answered 400" in result["msg"]
    assert "delivery-limit must be a number" in result["msg"]


def test_a_broker_that_is_down_fails_a_run_and_no_check(api, run):
    # Port 1 is nobody's.
    down = "http://127.0.0.1:1"
    result = run(down)
    assert result["failed"]
    assert f"{down} does not answer" in result["msg"]
    checked = run(down, check=True)
    assert not checked.get("failed")
    assert checked["changed"]
    assert "not compared" in checked["msg"]
