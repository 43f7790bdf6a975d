"""The module rabbitmq_objects: what differs, and how it talks to a management API that is a small server of ours."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.modules import rabbitmq_objects as objects
from helpers import executable
from hypothesis import assume, given
from hypothesis import strategies as st

ADMINISTRATOR, PASSWORD, NEW = "admin", "Secret-of-the-administrator", "Secret-that-is-new"


def hash_of(password, algorithm="sha256", salt=b"salt"):
    return base64.b64encode(salt + hashlib.new(algorithm, salt + password.encode()).digest()).decode()


# A small model of a broker: what is in it after definitions were sent, and after a path of the API was deleted

KEYS = {
    "vhosts": ("name",),
    "users": ("name",),
    "permissions": ("user", "vhost"),
    "topic_permissions": ("user", "vhost", "exchange"),
    "policies": ("vhost", "name"),
    "parameters": ("component", "vhost", "name"),
    "global_parameters": ("name",),
    "exchanges": ("vhost", "name"),
    "queues": ("vhost", "name"),
    "bindings": ("vhost", "source", "destination", "destination_type", "routing_key"),
}
# The kinds whose objects an import leaves as they are: seen on 4.0.5, which answers 204 all the same.
FIRST_STAYS = ("exchanges", "queues")


def imported(actual, sent):
    """RabbitMQ's import: each object of the definitions replaces the one of the same key, and the rest stays."""
    result = copy.deepcopy(actual)
    for kind, keys in KEYS.items():
        found = {tuple(entry[key] for key in keys): entry for entry in result.get(kind, [])}
        for entry in copy.deepcopy(sent.get(kind, [])):
            key = tuple(entry[name] for name in keys)
            if kind == "users" and key in found:
                # Seen on 4.0.5: limits are added to those that a user has.
                entry["limits"] = {**found[key]["limits"], **entry["limits"]}
            if kind == "parameters" and entry["component"] == "vhost-limits":
                # Limits that were taken back are an empty list then.
                entry["value"] = entry["value"] or []
            if kind not in FIRST_STAYS or key not in found:
                found[key] = entry
        result[kind] = list(found.values())
    return result


def deleted(actual, below):
    """What DELETE does: with a virtual host or a user goes all that is of it."""
    what, *names = map(unquote, below.split("/"))
    result = copy.deepcopy(actual)

    def drop(kind, **fields):
        result[kind] = [entry for entry in result.get(kind, []) if any(entry.get(name) != fields[name] for name in fields)]

    if what == "vhosts":
        drop("vhosts", name=names[0])
        for kind in KEYS:
            if "vhost" in KEYS[kind]:
                drop(kind, vhost=names[0])
    elif what == "users":
        drop("users", name=names[0])
        drop("permissions", user=names[0])
        drop("topic_permissions", user=names[0])
    elif what == "user-limits":
        for user in result["users"]:
            if user["name"] == names[0]:
                user["limits"].pop(names[1], None)
    elif what == "permissions":
        drop("permissions", vhost=names[0], user=names[1])
    elif what == "topic-permissions":
        drop("topic_permissions", vhost=names[0], user=names[1], exchange=names[2])
    elif what == "policies":
        drop("policies", vhost=names[0], name=names[1])
    else:
        assert what == "operator-policies"
        drop("parameters", component="operator_policy", vhost=names[0], name=names[1])
    return result


def steps(found):
    """What is done to the broker, one after the other."""
    return [(imported, found.send)] * bool(found.send) + [(deleted, below) for below in found.delete]


def done(actual, found):
    for step, value in steps(found):
        actual = step(actual, value)
    return actual


NAMES = st.sampled_from(["a", "b", "c/d", "e f"])
TEXT = st.text(max_size=5)
SECRETS = st.builds("Secret-{}".format, TEXT)
TAGS = st.lists(st.sampled_from(["administrator", "monitoring", "management"]), unique=True)
PATTERNS = st.sampled_from(["", ".*", "^a$"])
LIMITS = st.dictionaries(st.sampled_from(["max-connections", "max-channels"]), st.integers(0, 3), max_size=2)
VALUES = st.dictionaries(NAMES, st.integers() | TEXT, max_size=2)
# In the data as variables have it, or in the broker.
TYPES = st.sampled_from(["classic", "quorum", "stream"])


def records(*keys, **fields):
    """Lists of objects with the given fields; no two have the same key."""
    return st.lists(st.fixed_dictionaries(fields), max_size=3, unique_by=lambda entry: tuple(entry[key] for key in keys))


def policies(apply_to):
    fields = {
        "pattern": PATTERNS,
        apply_to: st.sampled_from(["all", "queues"]),
        "priority": st.integers(0, 9),
        "definition": VALUES,
    }
    return records("vhost", "name", vhost=NAMES, name=NAMES, **fields)


def bindings():
    fields = {"destination_type": st.sampled_from(["queue", "exchange"]), "routing_key": PATTERNS, "arguments": st.just({})}
    return records(*KEYS["bindings"], vhost=NAMES, source=NAMES, destination=NAMES, **fields)


URIS = st.builds("amqp://someone:{}@localhost".format, st.sampled_from(["HiddenA", "HiddenB"]))

WANTED = st.fixed_dictionaries(
    {
        "vhosts": records(
            "name",
            name=NAMES,
            description=st.none() | TEXT,
            default_queue_type=st.none() | TYPES,
            limits=st.none() | LIMITS,
        ),
        "users": records(
            "name",
            name=NAMES,
            password=SECRETS,
            tags=TAGS,
            limits=LIMITS,
            permissions=records("vhost", vhost=NAMES, configure=PATTERNS, write=PATTERNS, read=st.none() | PATTERNS),
            topic_permissions=records("vhost", "exchange", vhost=NAMES, exchange=NAMES, write=PATTERNS, read=PATTERNS),
        ),
        "policies": policies("apply_to"),
        "operator_policies": policies("apply_to"),
        "parameters": records(
            "vhost", "name", component=st.just("shovel"), vhost=NAMES, name=NAMES, value=st.fixed_dictionaries({"src-uri": URIS})
        ),
        "global_parameters": records("name", name=NAMES, value=VALUES | st.integers()),
        "exchanges": records("vhost", "name", vhost=NAMES, name=NAMES, type=st.sampled_from(["topic", "direct"])),
        "queues": records("vhost", "name", vhost=NAMES, name=NAMES, type=TYPES, arguments=st.just({})),
        "bindings": bindings(),
    }
)


def declared(**fields):
    return records("vhost", "name", vhost=NAMES, name=NAMES, durable=st.just(True), auto_delete=st.booleans(), **fields)


def parameters():
    limits = records("vhost", component=st.just("vhost-limits"), vhost=NAMES, name=st.just("limits"), value=LIMITS | st.just([]))
    others = records(
        "vhost", "name", component=st.just("shovel"), vhost=NAMES, name=NAMES, value=st.fixed_dictionaries({"u": URIS})
    )
    operator = policies("apply-to").map(
        lambda found: [
            {"component": "operator_policy", "vhost": policy.pop("vhost"), "name": policy.pop("name"), "value": policy}
            for policy in copy.deepcopy(found)
        ]
    )
    return st.builds(lambda *lists: [entry for entries in lists for entry in entries], limits, others, operator)


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
            name=NAMES | st.just("guest"),
            # Old brokers write tags as one string.
            tags=TAGS | TAGS.map(",".join),
            password_hash=SECRETS.map(hash_of) | st.just(""),
            hashing_algorithm=st.sampled_from(["rabbit_password_hashing_sha256", "rabbit_password_hashing_md5"]),
            limits=LIMITS,
        ),
        "permissions": records("user", "vhost", user=NAMES, vhost=NAMES, configure=PATTERNS, write=PATTERNS, read=PATTERNS),
        "topic_permissions": records(
            "user", "vhost", "exchange", user=NAMES, vhost=NAMES, exchange=NAMES, write=PATTERNS, read=PATTERNS
        ),
        "policies": policies("apply-to"),
        "parameters": parameters(),
        "global_parameters": records("name", name=NAMES, value=VALUES | st.integers()),
        "exchanges": declared(type=st.sampled_from(["topic", "direct"]), internal=st.booleans(), arguments=st.just({})),
        "queues": declared(arguments=st.fixed_dictionaries({"x-queue-type": TYPES}) | st.just({})),
        "bindings": bindings(),
    }
)
ADMINISTRATORS = st.sampled_from(["a", "the administrator"])


def compared(actual, wanted, purge=None, removable=()):
    """The differences, with a purge by the administrator `purge` if one is given."""
    found = objects.Differences(actual, wanted)
    if purge:
        found.purge(purge, removable)
    return found


# As the role refuses it: the administrator is in no list, and a virtual host is not both listed and to be removed.
def purged(actual, wanted, administrator):
    wanted = {**wanted, "users": [user for user in wanted["users"] if user["name"] != administrator]}
    return wanted, {vhost["name"] for vhost in actual["vhosts"]} - mentioned(wanted)


def mentioned(wanted):
    """The virtual hosts that the data names anywhere."""
    entries = [entry for kind in wanted for entry in wanted[kind]]
    entries += [entry for user in wanted["users"] for entry in [*user["permissions"], *user["topic_permissions"]]]
    return {entry.get("vhost") for entry in entries} | {vhost["name"] for vhost in wanted["vhosts"]}


@given(ACTUAL, WANTED)
def test_what_is_done_makes_it_so_and_nothing_more_is_to_be_done(actual, wanted):
    found = compared(actual, wanted)
    assert found.before.keys() == found.after.keys()
    assert bool(found.send or found.delete) == bool(found) or found.clashes
    assume(not found.clashes)
    left = compared(done(actual, found), wanted)
    assert (left.send, left.delete, left.after, left.clashes) == ({}, [], {}, [])


@given(ACTUAL, WANTED, ADMINISTRATORS)
def test_a_purge_makes_it_so_and_nothing_more_is_to_be_done(actual, wanted, administrator):
    wanted, removable = purged(actual, wanted, administrator)
    found = compared(actual, wanted, administrator, removable)
    assume(not found.clashes)
    left = compared(done(actual, found), wanted, administrator, removable)
    assert (left.send, left.delete, left.after) == ({}, [], {})


@given(ACTUAL, WANTED, ADMINISTRATORS, st.integers(0, 9))
def test_a_run_that_was_interrupted_anywhere_is_finished_by_the_next(actual, wanted, administrator, count):
    wanted, removable = purged(actual, wanted, administrator)
    found = compared(actual, wanted, administrator, removable)
    assume(not found.clashes)
    broken = actual
    for step, value in steps(found)[:count]:
        broken = step(broken, value)
    finished = done(broken, compared(broken, wanted, administrator, removable))
    assert not compared(finished, wanted, administrator, removable)


@given(ACTUAL, WANTED, ADMINISTRATORS)
def test_a_purge_leaves_queues_exchanges_bindings_parameters_and_the_administrator(actual, wanted, administrator):
    wanted, _ = purged(actual, wanted, administrator)
    found = compared(actual, wanted, administrator, removable=set())
    after = done(actual, found)
    for kind in ("vhosts", "queues", "exchanges", "bindings", "global_parameters"):
        keys = [tuple(entry[key] for key in KEYS[kind]) for entry in after.get(kind, [])]
        assert {tuple(entry[key] for key in KEYS[kind]) for entry in actual[kind]} <= set(keys)
    shovels = {(entry["vhost"], entry["name"]) for entry in after["parameters"] if entry["component"] == "shovel"}
    assert {(entry["vhost"], entry["name"]) for entry in actual["parameters"] if entry["component"] == "shovel"} <= shovels
    assert [user for user in actual["users"] if user["name"] == administrator] == [
        user for user in after["users"] if user["name"] == administrator
    ]
    grants = [entry for entry in actual["permissions"] if entry["user"] == administrator]
    assert [entry for entry in after["permissions"] if entry["user"] == administrator] == grants


@given(ACTUAL, WANTED)
def test_without_a_purge_nothing_goes_but_guest_and_limits(actual, wanted):
    found = compared(actual, wanted)
    assert {below for below in found.delete if not below.startswith("user-limits/")} <= {"users/guest"}


@given(WANTED, st.randoms(use_true_random=False))
def test_the_order_of_lists_means_nothing(wanted, random):
    actual = imported({}, objects.Differences({}, wanted).send)
    for entries in [*actual.values(), *(user["tags"] for user in actual["users"])]:
        random.shuffle(entries)
    assert not compared(actual, wanted)


@given(ACTUAL, WANTED, ADMINISTRATORS)
def test_what_is_shown_holds_no_secret(actual, wanted, administrator):
    found = compared(actual, wanted, administrator, {vhost["name"] for vhost in actual["vhosts"]})
    shown = json.dumps([found.before, found.after, found.clashes])
    secrets = [user["password"] for user in wanted["users"]] + [user["password_hash"] for user in actual["users"]]
    secrets += [user["password_hash"] for user in found.send.get("users", [])] + ["HiddenA", "HiddenB"]
    assert not [secret for secret in secrets if secret and secret in shown]


def test_what_is_not_listed_is_left_alone():
    actual = {"users": [{"name": "by hand", "tags": [], "password_hash": ""}], "vhosts": [{"name": "/"}]}
    assert not compared(actual, {})


@pytest.mark.parametrize(
    ("queues", "exchanges", "connections", "parts"),
    [
        ([], [{"name": ""}, {"name": "amq.topic"}], [], []),
        ([{"messages": 0}], [], [], ["1 queues"]),
        ([{"messages": 2}, {"messages": 3}], [{"name": "amqp"}], [{}], ["2 queues", "5 messages", "1 exchanges", "1 connections"]),
        # A queue that is down has no count.
        ([{"messages": None}], [], [], ["1 queues"]),
    ],
)
def test_what_keeps_a_virtual_host_from_being_empty(queues, exchanges, connections, parts):
    assert objects.occupants(queues, exchanges, connections) == parts


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            {"queues": [{"vhost": "v", "name": "q", "type": "quorum"}]},
            'queue q in v is there with {"arguments": {"x-queue-type": "classic"}}, which can\'t be made '
            '{"arguments": {"x-queue-type": "quorum"}}',
        ),
        (
            {"exchanges": [{"vhost": "v", "name": "e", "type": "fanout"}]},
            'exchange e in v is there with {"type": "direct"}, which can\'t be made {"type": "fanout"}',
        ),
    ],
)
def test_what_clashes_in_type_is_told(wanted, sentence):
    as_it_is = {"vhost": "v", "durable": True, "auto_delete": False, "arguments": {}}
    actual = {"queues": [{**as_it_is, "name": "q"}], "exchanges": [{**as_it_is, "name": "e", "type": "direct", "internal": False}]}
    found = compared(actual, wanted)
    assert found.clashes == [sentence]
    assert not found.send


@pytest.mark.parametrize(
    ("value", "secrets", "shown"),
    [
        ("amqp://u:p%40ss@h/v", {"p%40ss"}, "amqp://u:********@h/v"),
        ({"a": ["amqps://u:secret@h", 1]}, {"secret"}, {"a": ["amqps://u:********@h", 1]}),
        ("amqp://h:5672/v", set(), "amqp://h:5672/v"),
        ("see http://h/a:b@c", set(), "see http://h/a:b@c"),
    ],
)
def test_passwords_in_uris_are_masked(value, secrets, shown):
    assert objects.secrets_in(value) == secrets
    assert objects.masked(value) == shown


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
    """A broker's API behind HTTP, as far as the module asks it, and what was asked."""

    def __init__(self, folder):
        self.definitions = {"users": [{"name": ADMINISTRATOR, "password_hash": hash_of(PASSWORD)}], "vhosts": []}
        self.flags = {"old": "enabled", "new": "disabled", "newer than this node": "unavailable"}
        self.queues, self.connections = {}, {}
        self.requests, self.refusal, self.imported = [], None, folder / "imported.json"

    def administrators_hash(self):
        """The one that rabbitmqctl imported, if it did."""
        source = json.loads(self.imported.read_text()) if self.imported.exists() else self.definitions
        return {user["name"]: user["password_hash"] for user in source["users"]}[ADMINISTRATOR]

    def answer(self, method, below, authorization, body):
        self.requests.append(method if below == "definitions" else f"{method} {below}")
        name, _, password = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        user = {"password_hash": self.administrators_hash(), "hashing_algorithm": "rabbit_password_hashing_sha256"}
        if name != ADMINISTRATOR or not objects.password_matches(password, user):
            return 401, {"error": "not_authorized"}
        if self.refusal and method == "POST":
            return self.refusal
        if method == "POST":
            self.definitions = imported(self.definitions, json.loads(body))
            return 204, None
        if method == "DELETE":
            self.definitions = deleted(self.definitions, below)
            return 204, None
        if method == "PUT":
            self.flags[unquote(below.split("/")[1])] = "enabled"
            return 204, None
        what, *names = map(unquote, below.partition("?")[0].split("/"))
        if what == "feature-flags":
            return 200, [{"name": name, "state": state, "stability": "stable"} for name, state in self.flags.items()]
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
            text = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_DELETE = do_GET

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


LOOK = ["GET", "GET feature-flags"]


def test_one_request_makes_it_so_and_what_was_sent_is_read_back(api, run):
    wanted = {"vhosts": [{"name": "app"}], "users": [WORKER]}
    first = run(api.url, **wanted)
    assert first["changed"]
    assert first["diff"]["after"]["vhost app"] == {"description": "", "default_queue_type": "quorum"}
    assert WORKER["password"] not in json.dumps(first)
    assert api.requests == [*LOOK, "POST", "GET"]
    assert not run(api.url, **wanted)["changed"]
    assert api.requests == [*LOOK, "POST", "GET", *LOOK]


def test_check_mode_compares_and_sends_nothing(api, run):
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


def test_guest_goes(api, run):
    api.definitions["users"].append({"name": "guest", "tags": ["administrator"], "password_hash": ""})
    assert run(api.url)["removed"] == ["user guest"]
    assert not run(api.url)["changed"]


def test_a_purge_keeps_a_virtual_host_with_something_in_it_unless_it_is_named(api, run, monkeypatch):
    warned = []
    # How Ansible hands on a warning depends on what else of it was loaded by then.
    monkeypatch.setattr(objects.AnsibleModule, "warn", lambda _, text: warned.append(text))
    api.definitions["vhosts"] += [{"name": name} for name in ("a/b", "empty", "in use", "app")]
    api.queues["a/b"] = [{"name": "q", "messages": 3}]
    api.connections["in use"] = [{}]
    wanted = {"vhosts": [{"name": "app", "default_queue_type": "quorum"}], "purge": True}
    checked = run(api.url, check=True, **wanted)
    assert checked["removed"] == ["vhost empty"]
    assert len(warned) == 2
    assert "rabbitmq_purge_vhosts with its name would remove it" in warned[0]
    first = run(api.url, **wanted)
    assert first["removed"] == ["vhost empty"]
    assert first["kept"] == [
        "vhost a/b is not listed and stays: it has 1 queues, 3 messages.",
        "vhost in use is not listed and stays: it has 1 connections.",
    ]
    assert not run(api.url, **wanted)["changed"]
    assert run(api.url, **wanted, purge_vhosts=["a/b"])["removed"] == ["vhost a/b"]
    assert [vhost["name"] for vhost in api.definitions["vhosts"]] == ["in use", "app"]


def test_what_an_import_passes_over_is_told(api, run, monkeypatch):
    """A transient queue is in no definitions, and the import leaves it as it is."""
    monkeypatch.setitem(globals(), "imported", lambda actual, _: actual)
    monkeypatch.setattr(objects.time, "sleep", lambda _: None)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(objects.time, "monotonic", lambda: next(clock))
    result = run(api.url, queues=[{"vhost": "app", "name": "q"}])
    assert result["failed"]
    assert "does not have it so: queue q in app. A queue or an exchange of that name" in result["msg"]


def test_a_clash_in_type_is_an_error_before_anything_is_sent(api, run):
    api.definitions["exchanges"] = [
        {"vhost": "app", "name": "e", "type": "direct", "durable": True, "auto_delete": False, "internal": False, "arguments": {}}
    ]
    for check in (True, False):
        result = run(api.url, check=check, vhosts=[{"name": "new"}], exchanges=[{"vhost": "app", "name": "e"}])
        assert result["failed"]
        assert 'exchange e in app is there with {"type": "direct"}, which can\'t be made {"type": "topic"}' in result["msg"]
    assert "POST" not in api.requests


def test_passwords_in_parameters_are_printed_nowhere(api, run, capsys):
    uri = "amqp://someone:{}@localhost"
    was = {"component": "shovel", "vhost": "app", "name": "s", "value": {"src-uri": uri.format("HiddenBefore")}}
    api.definitions["parameters"] = [was]
    result = run(api.url, parameters=[{**was, "value": {"src-uri": uri.format("HiddenAfter")}}])
    assert result["changed"]
    assert api.definitions["parameters"][0]["value"]["src-uri"] == uri.format("HiddenAfter")
    # With the arguments, which Ansible prints at -vvv.
    assert "invocation" in result
    assert "Hidden" not in json.dumps(result)


def test_an_administrator_whom_the_broker_refuses_is_set_by_the_cookie(api, run, tmp_path):
    result = run(api.url, password=NEW, vhosts=[{"name": "app"}])
    assert result["changed"]
    assert result["diff"]["after"][f"user {ADMINISTRATOR}"] == {"password": "as wanted"}
    assert api.requests == ["GET", *LOOK, "POST", "GET"]
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
