"""Tests the comparison of a broker's definitions with the variables. A model, not a broker, computes the result of an import."""

from __future__ import annotations

import copy
import json

import pytest
from ansible_collections.django_celery.stack.plugins.module_utils.broker import contents
from ansible_collections.django_celery.stack.plugins.module_utils.definitions import KINDS, Purge, compare
from ansible_collections.django_celery.stack.plugins.module_utils.masking import masked, uri_passwords
from ansible_collections.django_celery.stack.plugins.module_utils.password_hash import password_matches
from broker_model import KEYS, deleted, hash_of, imported
from hypothesis import assume, given
from hypothesis import strategies as st


def steps(found):
    """The requests to the broker, in order."""
    return [(imported, found.to_import)] * bool(found.to_import) + [(deleted, below) for below in found.to_delete]


def done(actual, found):
    for step, value in steps(found):
        actual = step(actual, value)
    return actual


# These strategies generate definitions: WANTED from the variables, ACTUAL from a broker.
NAMES = st.sampled_from(["a", "b", "c/d", "e f"])
TEXT = st.text(max_size=5)
SECRETS = st.builds("Secret-{}".format, TEXT)
TAGS = st.lists(st.sampled_from(["administrator", "monitoring", "management"]), unique=True)
PATTERNS = st.sampled_from(["", ".*", "^a$"])
LIMITS = st.dictionaries(st.sampled_from(["max-connections", "max-channels"]), st.integers(0, 3), max_size=2)
VALUES = st.dictionaries(NAMES, st.integers() | TEXT, max_size=2)
TYPES = st.sampled_from(["classic", "quorum", "stream"])


def records(*keys, **fields):
    """Lists of objects with the given fields and unique keys."""
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
            # Old brokers export tags as one string.
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


def compared(actual, wanted, administrator=None, removable=()):
    """The difference. If an administrator is given, it includes a purge."""
    return compare(actual, wanted, Purge(administrator, removable) if administrator else None)


# The role refuses a listed administrator, and a virtual host that is both listed and purged. So the generated data has neither.
def purged(actual, wanted, administrator):
    wanted = {**wanted, "users": [user for user in wanted["users"] if user["name"] != administrator]}
    return wanted, {vhost["name"] for vhost in actual["vhosts"]} - mentioned(wanted)


def mentioned(wanted):
    """The names of all virtual hosts in the data."""
    entries = [entry for kind in wanted for entry in wanted[kind]]
    entries += [entry for user in wanted["users"] for entry in [*user["permissions"], *user["topic_permissions"]]]
    return {entry.get("vhost") for entry in entries} | {vhost["name"] for vhost in wanted["vhosts"]}


@given(ACTUAL, WANTED)
def test_nothing_differs_after_the_import(actual, wanted):
    found = compared(actual, wanted)
    assert found.before.keys() == found.after.keys()
    assert bool(found.to_import or found.to_delete) == bool(found) or found.conflicts
    assume(not found.conflicts)
    left = compared(done(actual, found), wanted)
    assert (left.to_import, left.to_delete, left.after, left.conflicts) == ({}, [], {}, [])


@given(ACTUAL, WANTED, ADMINISTRATORS)
def test_nothing_differs_after_a_purge(actual, wanted, administrator):
    wanted, removable = purged(actual, wanted, administrator)
    found = compared(actual, wanted, administrator, removable)
    assume(not found.conflicts)
    left = compared(done(actual, found), wanted, administrator, removable)
    assert (left.to_import, left.to_delete, left.after) == ({}, [], {})


@given(ACTUAL, WANTED, ADMINISTRATORS, st.integers(0, 9))
def test_next_run_completes_an_interrupted_one(actual, wanted, administrator, count):
    wanted, removable = purged(actual, wanted, administrator)
    found = compared(actual, wanted, administrator, removable)
    assume(not found.conflicts)
    broken = actual
    for step, value in steps(found)[:count]:
        broken = step(broken, value)
    finished = done(broken, compared(broken, wanted, administrator, removable))
    assert not compared(finished, wanted, administrator, removable)


@given(ACTUAL, WANTED, ADMINISTRATORS)
def test_purge_keeps_queues_exchanges_bindings_parameters_and_the_administrator(actual, wanted, administrator):
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
def test_without_a_purge_only_guest_and_limits_are_deleted(actual, wanted):
    found = compared(actual, wanted)
    assert {below for below in found.to_delete if not below.startswith("user-limits/")} <= {"users/guest"}


@given(WANTED, st.randoms(use_true_random=False))
def test_order_of_lists_does_not_matter(wanted, random):
    actual = imported({}, compare({}, wanted).to_import)
    for entries in [*actual.values(), *(user["tags"] for user in actual["users"])]:
        random.shuffle(entries)
    assert not compared(actual, wanted)


@given(ACTUAL, WANTED, ADMINISTRATORS)
def test_diff_and_conflicts_contain_no_secrets(actual, wanted, administrator):
    found = compared(actual, wanted, administrator, {vhost["name"] for vhost in actual["vhosts"]})
    shown = json.dumps([found.before, found.after, found.conflicts])
    secrets = [user["password"] for user in wanted["users"]] + [user["password_hash"] for user in actual["users"]]
    secrets += [user["password_hash"] for user in found.to_import.get("users", [])] + ["HiddenA", "HiddenB"]
    assert not [secret for secret in secrets if secret and secret in shown]


def test_unlisted_objects_are_not_changed():
    actual = {"users": [{"name": "by hand", "tags": [], "password_hash": ""}], "vhosts": [{"name": "/"}]}
    assert not compared(actual, {})


@pytest.mark.parametrize(
    ("queues", "exchanges", "connections", "parts"),
    [
        ([], [{"name": ""}, {"name": "amq.topic"}], [], []),
        ([{"messages": 0}], [], [], ["1 queues"]),
        ([{"messages": 2}, {"messages": 3}], [{"name": "amqp"}], [{}], ["2 queues", "5 messages", "1 exchanges", "1 connections"]),
        # A queue that is down has no message count.
        ([{"messages": None}], [], [], ["1 queues"]),
    ],
)
def test_contents_of_a_virtual_host(queues, exchanges, connections, parts):
    assert contents(queues, exchanges, connections) == parts


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            {"queues": [{"vhost": "v", "name": "q", "type": "quorum"}]},
            'queue q in v exists with {"arguments": {"x-queue-type": "classic"}} and can\'t be changed to '
            '{"arguments": {"x-queue-type": "quorum"}}',
        ),
        (
            {"exchanges": [{"vhost": "v", "name": "e", "type": "fanout"}]},
            'exchange e in v exists with {"type": "direct"} and can\'t be changed to {"type": "fanout"}',
        ),
    ],
)
def test_conflicts_name_the_fields_that_differ(wanted, sentence):
    as_it_is = {"vhost": "v", "durable": True, "auto_delete": False, "arguments": {}}
    actual = {"queues": [{**as_it_is, "name": "q"}], "exchanges": [{**as_it_is, "name": "e", "type": "direct", "internal": False}]}
    found = compared(actual, wanted)
    assert found.conflicts == [sentence]
    assert not found.to_import


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
    assert uri_passwords(value) == secrets
    assert masked(value) == shown


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_password_matches_its_hash(algorithm):
    user = {"password_hash": hash_of("right", algorithm), "hashing_algorithm": f"rabbit_password_hashing_{algorithm}"}
    assert password_matches("right", user)
    assert not password_matches("wrong", user)


@pytest.mark.parametrize(
    "user",
    [
        {"password_hash": hash_of("right"), "hashing_algorithm": "rabbit_password_hashing_md5"},
        {"password_hash": hash_of("right")},
        {"password_hash": "", "hashing_algorithm": "rabbit_password_hashing_sha256"},
        {},
    ],
)
def test_hash_of_another_format_does_not_match(user):
    assert not password_matches("right", user)


def test_example_of_rabbitmqs_page_on_passwords():
    user = {
        "password_hash": "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR",
        "hashing_algorithm": "rabbit_password_hashing_sha256",
    }
    assert password_matches("test12", user)


# One example per kind: the entry in the variables, its title, and the imported object.
POLICY = {"pattern": "^a", "apply-to": "all", "priority": 0, "definition": {"max-length": 1}}
LISTED_POLICY = {"vhost": "v/1", "name": "p", "pattern": "^a", "definition": {"max-length": 1}}
EXAMPLES = {
    "vhosts": (
        {"vhosts": [{"name": "v/1", "description": "the first"}]},
        "vhost v/1",
        {
            "name": "v/1",
            "description": "the first",
            "default_queue_type": "quorum",
            "metadata": {"description": "the first", "default_queue_type": "quorum"},
        },
    ),
    "vhost_limits": (
        {"vhosts": [{"name": "v/1", "limits": {"max-queues": 3}}]},
        "limits of vhost v/1",
        {"component": "vhost-limits", "vhost": "v/1", "name": "limits", "value": {"max-queues": 3}},
    ),
    "users": (
        {"users": [{"name": "u", "password": "right", "tags": ["b", "a"]}]},
        "user u",
        {"name": "u", "tags": ["a", "b"], "limits": {}},
    ),
    "permissions": (
        {"users": [{"name": "u", "password": "right", "permissions": [{"vhost": "v/1", "read": ".*"}]}]},
        "permissions of u in v/1",
        {"user": "u", "vhost": "v/1", "configure": "", "write": "", "read": ".*"},
    ),
    "topic_permissions": (
        {"users": [{"name": "u", "password": "right", "topic_permissions": [{"vhost": "v/1", "exchange": "e", "write": "a"}]}]},
        "topic permissions of u on e in v/1",
        {"user": "u", "vhost": "v/1", "exchange": "e", "write": "a", "read": ""},
    ),
    "policies": ({"policies": [LISTED_POLICY]}, "policy p in v/1", {"vhost": "v/1", "name": "p", **POLICY}),
    "operator_policies": (
        {"operator_policies": [LISTED_POLICY]},
        "operator policy p in v/1",
        {"component": "operator_policy", "vhost": "v/1", "name": "p", "value": POLICY},
    ),
    "parameters": (
        {"parameters": [{"component": "shovel", "vhost": "v/1", "name": "s", "value": 0}]},
        "shovel s in v/1",
        {"component": "shovel", "vhost": "v/1", "name": "s", "value": 0},
    ),
    "global_parameters": (
        {"global_parameters": [{"name": "g", "value": {"a": 1}}]},
        "global parameter g",
        {"name": "g", "value": {"a": 1}},
    ),
    "exchanges": (
        {"exchanges": [{"vhost": "v/1", "name": "e", "internal": True}]},
        "exchange e in v/1",
        {
            "vhost": "v/1",
            "name": "e",
            "type": "topic",
            "durable": True,
            "auto_delete": False,
            "internal": True,
            "arguments": {},
        },
    ),
    "queues": (
        {"queues": [{"vhost": "v/1", "name": "q", "arguments": {"x-max-length": 1}}]},
        "queue q in v/1",
        {
            "vhost": "v/1",
            "name": "q",
            "durable": True,
            "auto_delete": False,
            "arguments": {"x-max-length": 1, "x-queue-type": "quorum"},
        },
    ),
    "bindings": (
        {"bindings": [{"vhost": "v/1", "source": "e", "destination": "q", "routing_key": "a.#", "arguments": {"x": 1}}]},
        "binding of queue q to e in v/1 by 'a.#' {\"x\": 1}",
        {
            "vhost": "v/1",
            "source": "e",
            "destination_type": "queue",
            "destination": "q",
            "routing_key": "a.#",
            "arguments": {"x": 1},
        },
    ),
}
# For each kind that a purge deletes, the API path of the example. A purge keeps the other kinds.
DELETED = {
    "vhosts": "vhosts/v%2F1",
    "users": "users/u",
    "permissions": "permissions/v%2F1/u",
    "topic_permissions": "topic-permissions/v%2F1/u/e",
    "policies": "policies/v%2F1/p",
    "operator_policies": "operator-policies/v%2F1/p",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_imported_compared_and_deleted(kind):
    variables, title, entry = EXAMPLES[kind]
    section = KINDS[kind].section
    found = compare({}, variables)
    assert title in found.after
    (sent,) = found.to_import[section]
    if kind == "users":
        assert password_matches("right", sent)
        sent = {name: value for name, value in sent.items() if name in entry}
    assert sent == entry
    exported = imported({}, found.to_import)
    assert not compare(exported, variables)
    # Run a purge without the object in the variables. A permission is deleted separately only if its user is kept.
    users = [{"name": "u", "password": "right"}] if "permissions" in kind else []
    kept = {**variables, "users": users} if users else {}
    purged = compare(exported, kept, Purge("admin", {"v/1"} if kind == "vhosts" else ()))
    assert purged.to_delete == ([DELETED[kind]] if kind in DELETED else [])
    assert (title in purged.after) is (kind in DELETED)


@pytest.mark.parametrize("kind", ["exchanges", "queues"])
def test_unchangeable_kind_conflicts(kind):
    variables, title, entry = EXAMPLES[kind]
    found = compare({kind: [{**entry, "auto_delete": True}]}, variables)
    assert found.conflicts == [f'{title} exists with {{"auto_delete": true}} and can\'t be changed to {{"auto_delete": false}}']
    assert not found.to_import


def test_unchanged_password_keeps_its_hash():
    user = {"name": "u", "password_hash": hash_of("right"), "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": []}
    found = compare({"users": [user]}, {"users": [{"name": "u", "password": "right", "tags": ["monitoring"]}]})
    assert found.to_import["users"][0]["password_hash"] == user["password_hash"]
    assert found.after["user u"] == {"tags": ["monitoring"], "limits": {}, "password": "as wanted"}


def test_unset_metadata_of_a_virtual_host_is_kept():
    actual = {"name": "v", "metadata": {"tags": ["eu"], "description": "old"}}
    found = compare({"vhosts": [actual]}, {"vhosts": [{"name": "v", "description": "new"}]})
    assert found.to_import["vhosts"][0]["metadata"] == {"tags": ["eu"], "description": "new", "default_queue_type": "quorum"}
