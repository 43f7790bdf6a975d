"""Runs the role's task file for definitions, with its module, on a real broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import amqp
import pytest

ROOT = Path(__file__).resolve().parents[3]

LIMITED = {"name": "shop/eu", "description": "of the tests", "limits": {"max-queues": 3}}
CLERK = {
    "name": "clerk",
    "password": "Secret-of-the-clerk",
    "tags": ["management"],
    "limits": {"max-connections": 2, "max-channels": 5},
    "permissions": [{"vhost": "shop/eu", "configure": "^order", "write": ".*", "read": ".*"}],
    "topic_permissions": [
        {"vhost": "shop/eu", "exchange": "orders", "write": "^order[.]", "read": ".*"},
        {"vhost": "shop/eu", "exchange": "amq.topic", "write": "", "read": ""},
    ],
}
IN_IT = {
    "rabbitmq_policies": [
        {"name": "p", "vhost": "shop/eu", "pattern": "^order", "definition": {"max-length": 10, "delivery-limit": 3}}
    ],
    "rabbitmq_operator_policies": [
        {"name": "o", "vhost": "shop/eu", "pattern": ".*", "apply_to": "queues", "definition": {"max-length": 7}}
    ],
    "rabbitmq_parameters": [
        {"component": "federation-upstream", "vhost": "shop/eu", "name": "u", "value": {"uri": "amqp://clerk:Hidden-uri@localhost"}}
    ],
    "rabbitmq_global_parameters": [{"name": "shop", "value": {"open": True}}],
    "rabbitmq_exchanges": [{"name": "orders", "vhost": "shop/eu"}],
    "rabbitmq_queues": [{"name": "orders.v1", "vhost": "shop/eu"}],
    "rabbitmq_bindings": [{"vhost": "shop/eu", "source": "orders", "destination": "orders.v1", "routing_key": "order.#"}],
}
ALL = {
    "vhost shop/eu",
    "limits of vhost shop/eu",
    "user clerk",
    "permissions of clerk in shop/eu",
    "topic permissions of clerk on orders in shop/eu",
    "topic permissions of clerk on amq.topic in shop/eu",
    "policy p in shop/eu",
    "operator policy o in shop/eu",
    "federation-upstream u in shop/eu",
    "global parameter shop",
    "exchange orders in shop/eu",
    "queue orders.v1 in shop/eu",
    "binding of queue orders.v1 to orders in shop/eu by 'order.#' {}",
}
LISTS = ("rabbitmq_vhosts", "rabbitmq_users", "rabbitmq_policies")


@pytest.fixture(scope="module")
def own(host):
    """The definitions of the scenario."""
    names = ", ".join(f"'{key}': {key}" for key in LISTS)
    return host.ansible("debug", f"msg={{{{ {{{names}}} }}}}", check=False)["msg"]


@pytest.fixture
def role(tmp_path, own, api, variables):
    """Imports the scenario's definitions with additions; returns the module's result.

    Afterwards, restores the scenario's definitions.
    """
    task = {
        "include_role": {"name": "django_celery.stack.rabbitmq", "tasks_from": "definitions"},
        "vars": {"__rabbitmq_not_installed": False, "__rabbitmq_conf_dir": "/etc/rabbitmq"},
    }
    play = {"hosts": "broker", "become": True, "gather_facts": False, "tasks": [task]}
    (tmp_path / "play.json").write_text(json.dumps([play]))
    name = variables["inventory_hostname"]

    def run(*words, **more):
        (tmp_path / "extra.json").write_text(json.dumps({**more, **{key: own[key] + more.get(key, []) for key in LISTS}}))
        command = [
            Path(sys.executable).with_name("ansible-playbook"),
            "-e",
            f"@{tmp_path}/extra.json",
            "-l",
            name,
            "-vvv",
        ]
        environment = {
            **os.environ,
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        }
        done = subprocess.run(
            [*command, *words, tmp_path / "play.json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        for secret in (CLERK["password"], "Hidden-uri", own["rabbitmq_users"][0]["password"]):
            assert secret not in done.stdout + done.stderr
        answer = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index('{\n    "custom_stats"') :])[0]
        return answer["plays"][0]["tasks"][-1]["hosts"][name]

    yield run
    for parameter in api("global-parameters"):
        if parameter["name"] == "shop":
            api("global-parameters/shop", "DELETE")
    run(rabbitmq_purge=True, rabbitmq_purge_vhosts=["shop/eu", "left"])
    assert not run(rabbitmq_purge=True)["changed"]


def test_all_kinds_are_imported_and_a_second_run_changes_nothing(role, api):
    data = {**IN_IT, "rabbitmq_vhosts": [LIMITED], "rabbitmq_users": [CLERK]}
    checked = role("--check", **data)
    assert checked["changed"]
    assert "shop/eu" not in [vhost["name"] for vhost in api("vhosts")]
    first = role(**data)
    assert first.get("diff") == checked["diff"], first
    assert first["diff"]["after"].keys() == ALL
    assert not role(**data)["changed"]
    # A limit and a permission are removed; all other objects are kept.
    less = {**CLERK, "limits": {"max-channels": 5}, "topic_permissions": CLERK["topic_permissions"][:1]}
    data |= {"rabbitmq_vhosts": [{**LIMITED, "limits": {}}], "rabbitmq_users": [less]}
    assert role(**data, rabbitmq_purge=True)["removed"] == ["topic permissions of clerk on amq.topic in shop/eu"]
    assert api("user-limits/clerk") == [{"user": "clerk", "value": {"max-channels": 5}}]
    assert [entry["exchange"] for entry in api("users/clerk/topic-permissions")] == ["orders"]
    assert not role(**data, rabbitmq_purge=True)["changed"]


def test_definitions_apply_to_clients(role, published, api, eventually):
    role(**IN_IT, rabbitmq_vhosts=[LIMITED], rabbitmq_users=[CLERK])

    def connect(password=CLERK["password"]):
        found = amqp.Connection(f"127.0.0.1:{published(5672)}", "clerk", password, virtual_host="shop/eu", connect_timeout=10)
        found.connect()
        return found

    with connect() as connection:
        channel = connection.channel()
        channel.basic_publish(amqp.Message("one"), exchange="orders", routing_key="order.one")
        assert eventually(lambda: channel.basic_get("orders.v1", no_ack=True)).body in ("one", b"one")
        # The operator policy's limit is lower than the policy's.
        found = eventually(lambda: api("queues/shop%2Feu/orders.v1").get("effective_policy_definition"))
        assert found == {"max-length": 7, "delivery-limit": 3}
        with pytest.raises(amqp.exceptions.AccessRefused, match="write access to topic 'invoice'"):
            channel.basic_publish(amqp.Message("two"), exchange="orders", routing_key="invoice")
            channel.queue_declare("orders.v1", passive=True)
    (upstream,) = api("parameters/federation-upstream/shop%2Feu")
    assert (upstream["name"], upstream["value"]) == ("u", IN_IT["rabbitmq_parameters"][0]["value"])
    assert api("global-parameters/shop")["value"] == {"open": True}
    connections = [connect(), connect()]
    with pytest.raises(amqp.exceptions.NotAllowed, match="limit"):
        connect()
    for connection in connections:
        connection.close()
    role(**IN_IT, rabbitmq_vhosts=[LIMITED], rabbitmq_users=[{**CLERK, "password": "Secret-of-the-clerk-2"}])
    with pytest.raises(amqp.exceptions.AccessRefused):
        connect()
    connect("Secret-of-the-clerk-2").close()


def test_purge_reports_removals_and_keeps_objects_of_clients(role, api):
    role(**IN_IT, rabbitmq_vhosts=[LIMITED, {"name": "left"}], rabbitmq_users=[CLERK])
    api("queues/mailroom/mail.spared", "PUT", json={"durable": True, "arguments": {"x-queue-type": "quorum"}})
    api(
        "exchanges/shop%2Feu/orders/publish",
        "POST",
        json={"properties": {}, "routing_key": "order.1", "payload": "1", "payload_encoding": "string"},
    )
    removed = ["vhost left", "user clerk", "policy p in shop/eu", "operator policy o in shop/eu"]
    checked = role("--check", rabbitmq_purge=True)
    assert checked["removed"] == removed
    result = role(rabbitmq_purge=True)
    assert result["removed"] == removed
    (kept,) = result["kept"]
    assert kept.startswith("vhost shop/eu is not listed and stays: it has 1 queues, ")
    assert {(queue["vhost"], queue["name"]) for queue in api("queues")} == {
        ("mailroom", "mail.spared"),
        ("shop/eu", "orders.v1"),
    }
    assert [exchange["name"] for exchange in api("exchanges/shop%2Feu") if exchange["name"] == "orders"] == ["orders"]
    assert not role(rabbitmq_purge=True)["changed"]
    assert role(rabbitmq_purge=True, rabbitmq_purge_vhosts=["shop/eu"])["removed"] == ["vhost shop/eu"]
    api("queues/mailroom/mail.spared", "DELETE")


@pytest.mark.parametrize("durable", [True, False])
def test_existing_queue_with_other_properties_is_an_error(role, api, published, own, durable):
    """A durable queue of another type is detected before the import.

    A transient queue is not in the export, so it is detected after the import.
    """
    role(rabbitmq_vhosts=[LIMITED], rabbitmq_users=[CLERK])
    connection = amqp.Connection(f"127.0.0.1:{published(5672)}", "clerk", CLERK["password"], virtual_host="shop/eu")
    connection.connect()
    arguments = {"x-queue-type": "classic"}
    # An exclusive queue is deleted with its connection.
    connection.channel().queue_declare("order", durable=durable, exclusive=not durable, auto_delete=False, arguments=arguments)
    result = role(rabbitmq_vhosts=[LIMITED], rabbitmq_users=[CLERK], rabbitmq_queues=[{"name": "order", "vhost": "shop/eu"}])
    assert result["failed"]
    assert "queue order in shop/eu" in result["msg"]
    assert ("can't be changed" if durable else "transient or exclusive") in result["msg"]
    connection.close()
    if durable:
        api("queues/shop%2Feu/order", "DELETE")
    result = role(rabbitmq_vhosts=[LIMITED], rabbitmq_users=[CLERK], rabbitmq_queues=[{"name": "order", "vhost": "shop/eu"}])
    assert result["changed"]
    assert not result.get("failed")


def test_refused_policy_is_reported_and_the_next_run_completes(role, api):
    data = {"rabbitmq_vhosts": [LIMITED], "rabbitmq_users": [CLERK]}
    policy = {"name": "p", "vhost": "shop/eu", "pattern": "^order", "definition": {"no-such-key": 1}}
    result = role(**data, rabbitmq_policies=[policy])
    assert result["failed"]
    assert "answered 400" in result["msg"]
    assert "no-such-key" in result["msg"]
    # The import has created the objects before the policy.
    assert "shop/eu" in [vhost["name"] for vhost in api("vhosts")]
    result = role(**data, rabbitmq_policies=[{**policy, "definition": {"max-length": 1}}])
    assert result["diff"]["after"].keys() == {"limits of vhost shop/eu", "policy p in shop/eu"}
    assert not result.get("failed")


def test_unavailable_broker_is_reported(role, host):
    with host.sudo():
        host.check_output("systemctl stop rabbitmq-server")
    try:
        result = role("--check")
    finally:
        with host.sudo():
            host.check_output("systemctl start rabbitmq-server")
    assert "does not answer" in result["msg"]
    assert "not compared" in result["msg"]


def test_check_mode_reports_changes_of_an_existing_broker(role, api, own):
    """The broker's administrator exists; its users and policies were created manually."""
    api("vhosts/left", "PUT", json={"default_queue_type": "classic"})
    api("users/by-hand", "PUT", json={"password": "by hand", "tags": "management"})
    api("users/guest", "PUT", json={"password": "guest", "tags": "administrator"})
    api("permissions/left/by-hand", "PUT", json={"configure": ".*", "write": ".*", "read": ".*"})
    listed = {"rabbitmq_vhosts": [{"name": "left"}]}
    before = api("definitions")
    checked = role("--check", **listed)
    assert checked["diff"]["before"]["vhost left"]["default_queue_type"] == "classic"
    assert checked["diff"]["after"]["vhost left"]["default_queue_type"] == "quorum"
    assert checked["removed"] == ["user guest"]
    assert role("--check", **listed, rabbitmq_purge=True)["removed"] == ["user guest", "user by-hand"]
    assert api("definitions") == before
    assert role(**listed)["diff"] == checked["diff"]
    assert "by-hand" in [user["name"] for user in api("users")]
