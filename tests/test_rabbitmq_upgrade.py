"""Tests which upgrades of RabbitMQ are refused because of its version, its data, or the state of the running broker."""

from __future__ import annotations

import json

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.filter import rabbitmq_migration
from ansible_collections.django_celery.stack.plugins.module_utils import rabbitmq_upgrade
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.rabbitmq_versions import upstream
from ansible_collections.django_celery.stack.plugins.modules import rabbitmq_upgrade as module
from helpers import ROOT

DATA = yaml.safe_load((ROOT / "roles/rabbitmq/vars/main/compatibility.yml").read_text())
PATHS, REQUIRED = DATA["__rabbitmq_upgrade_paths"], DATA["__rabbitmq_required_flags"]
TABLE = DATA["__rabbitmq_compatibility"] + DATA["__rabbitmq_old_compatibility"]
# The file of Debian 12's RabbitMQ 3.10.8.
FLAGS_OF_310 = """[classic_mirrored_queue_version,implicit_default_bindings,
 maintenance_mode_status,quorum_queue,stream_queue,user_limits,
 virtual_host_metadata].
"""
FLAGS_OF_313 = {*rabbitmq_upgrade.enabled_flags(FLAGS_OF_310), *REQUIRED["4.0"]}
FLAGS_OF_40 = {*FLAGS_OF_313, "rabbitmq_4.0.0", "khepri_db"}


def refusal(installed, wanted, erlang="27", flags=FLAGS_OF_40):
    return rabbitmq_upgrade.offline_refusal(installed, wanted, erlang, flags, PATHS, REQUIRED, TABLE)


@pytest.mark.parametrize(
    ("installed", "wanted", "erlang"),
    [
        ("", "4.0", "27"),
        ("4.0.5", "4.0", "27"),
        ("4.0.5", "4.0.6", "27"),
        ("4.0.5", "4.1", "27"),
        ("4.1.8", "4.2.10", "27"),
        ("4.0.5", "4.2", "27"),
        ("4.2.10", "4.3", "27"),
    ],
)
def test_allowed_paths(installed, wanted, erlang):
    assert refusal(installed, wanted, erlang) == ""


def test_upgrade_from_313_is_allowed_with_its_erlang_and_its_flags():
    assert refusal("3.13.7", "4.0.4", "26.2", FLAGS_OF_313) == ""


@pytest.mark.parametrize(
    ("installed", "wanted", "reason"),
    [
        ("3.10.8", "4.0", "RabbitMQ 3.10.8 is installed, and rabbitmq_version is 4.0, which can read the data of 3.13, 4.0 only."),
        ("4.0.5", "4.3", "which can read the data of 4.2, 4.3 only."),
        ("4.1.8", "4.3", "which can read the data of 4.2, 4.3 only."),
        ("4.3.5", "4.2", "An older RabbitMQ can't read the data of a newer one. Set rabbitmq_version to 4.3."),
        ("4.0.5", "4.0.4", "An older RabbitMQ can't read the data of a newer one. Set rabbitmq_version to 4.0."),
        ("4.10.1", "4.2", "An older RabbitMQ can't read"),
    ],
)
def test_refused_paths(installed, wanted, reason):
    assert reason in refusal(installed, wanted)


def test_erlang_on_which_the_installed_series_does_not_run_is_refused():
    expected = "RabbitMQ 3.13.7 is installed, which does not run on Erlang 27 (rabbitmq_erlang_version)."
    assert expected in refusal("3.13.7", "4.0", "27", FLAGS_OF_313)
    assert "RabbitMQ 4.0.2 is installed, which does not run on Erlang 27" in refusal("4.0.2", "4.0", "27")
    assert refusal("4.0.2", "4.0", "26.2") == ""


def test_disabled_flags_of_313_are_named():
    found = refusal("3.13.7", "4.0", "26.2", FLAGS_OF_313 - {"stream_filtering"})
    assert found.startswith("RabbitMQ 4.0 requires the feature flags stream_filtering, which RabbitMQ 3.13.7 has not enabled.")


def test_khepri_of_313_is_refused():
    assert "khepri_db" in refusal("3.13.7", "4.0", "26.2", FLAGS_OF_313 | {"khepri_db"})
    # RabbitMQ 4.0 can have Khepri.
    assert refusal("4.0.5", "4.2", "27", FLAGS_OF_40) == ""


@pytest.mark.parametrize("installed", ["4.0.5", ""])
def test_data_that_the_new_version_cannot_read_is_recognised(installed, tmp_path):
    (tmp_path / "rabbit@mq1-feature_flags").write_text(FLAGS_OF_310)
    flags = rabbitmq_upgrade.flags_of_data(str(tmp_path))
    found = refusal(installed, "4.0", flags=flags)
    assert "does not start with it, because it lacks the required feature flags classic_queue_type_delivery_support, " in found
    assert rabbitmq_upgrade.MIGRATE in found


def test_no_data_is_no_reason(tmp_path):
    assert rabbitmq_upgrade.flags_of_data(str(tmp_path)) is None
    assert rabbitmq_upgrade.flags_of_data(str(tmp_path / "missing")) is None
    assert refusal("", "4.0", flags=None) == ""


def test_quoted_flags_are_read():
    assert rabbitmq_upgrade.enabled_flags("[khepri_db,'rabbitmq_4.0.0',\n 'rabbitmq_4.1.0'].\n") == {
        "khepri_db",
        "rabbitmq_4.0.0",
        "rabbitmq_4.1.0",
    }


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.10.8-1.1+deb12u1", "3.10.8"), ("4.0.5", "4.0.5"), ("1:27.3.4.1+dfsg-1", "27.3.4.1"), ("", ""), ("unknown", "")],
)
def test_version_of_a_package(version, expected):
    assert upstream(version) == expected


# The running broker

NODE = {"name": "rabbit@mq1", "running": True}
ALARM = {"node": "rabbit@mq1", "resource": "memory"}
QUEUE = {"name": "mail", "vhost": "shop", "members": ["a", "b", "c"], "online": ["a", "b"]}
FLAG = {"name": "khepri_db", "state": "enabled", "stability": "stable"}


@pytest.mark.parametrize(
    ("node", "queue", "flag", "reason"),
    [
        ({}, {}, {}, None),
        ({"running": False}, {}, {}, "The node rabbit@mq1 is not running."),
        ({}, {"online": ["a"]}, {}, "The queue mail in shop has no majority: 1 of 3 members run."),
        ({}, {"members": ["a", "b"], "online": ["a"]}, {}, "The queue mail in shop has no majority: 1 of 2 members run."),
        ({}, {}, {"state": "disabled"}, "The feature flags khepri_db are not enabled. Run `rabbitmqctl enable_feature_flag all`."),
        ({}, {}, {"state": "disabled", "stability": "experimental"}, None),
        ({}, {}, {"state": "unavailable"}, None),
    ],
)
def test_states_that_prevent_an_upgrade(node, queue, flag, reason):
    found = rabbitmq_upgrade.broker_refusals([{**NODE, **node}], [], [{**QUEUE, **queue}], [{**FLAG, **flag}])
    assert found == ([reason] if reason else [])


def test_classic_queue_has_no_members():
    assert rabbitmq_upgrade.broker_refusals([NODE], [], [{"name": "q", "vhost": "shop"}], [FLAG]) == []


def test_queues_with_an_old_machine_version():
    statuses = {
        "current in shop": [{"Machine Version": 4}, {"Machine Version": 4}],
        "old in shop": [{"Machine Version": 4}, {"Machine Version": 3}],
        "silent in shop": [{"Machine Version": 4}, {"Machine Version": ""}],
    }
    assert rabbitmq_upgrade.old_queues(statuses, 4) == ["old in shop", "silent in shop"]


# The module


class Api:
    """Imitates the management API of a broker with one quorum queue."""

    def __init__(self, *_):
        pass

    def get(self, path):
        if path.startswith("nodes?"):
            return [NODE]
        if path.startswith("queues/quorum/shop/mail/"):
            return [{"Machine Version": 4}]
        if path.startswith("queues?"):
            return [{**QUEUE, "type": "quorum"}]
        assert path == "feature-flags"
        return [FLAG]

    def health(self, check):
        assert check == "alarms"
        return {"status": "ok"}


class SilentApi(Api):
    def get(self, path):
        raise Failure("No answer.")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def run(installed, wanted, api=Api, machine_version=4):
        monkeypatch.setattr(module, "installed_versions", lambda names: {"rabbitmq-server": installed} if installed else {})
        monkeypatch.setattr(module, "ManagementApi", api)
        monkeypatch.setattr(rabbitmq_upgrade, "current_machine_version", lambda: machine_version)
        arguments = {
            "version": wanted,
            "erlang": "27",
            "data": str(tmp_path),
            "url": "",
            "administrator": "a",
            "password": "Secret",
        }
        tables = {"paths": PATHS, "required_flags": REQUIRED, "compatibility": TABLE}
        with patch_module_args({**arguments, **tables}), pytest.raises(SystemExit):
            module.main()
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("installed", ["", "4.0.5-8", "4.0.5"])
def test_broker_is_not_asked_without_an_upgrade(run, installed):
    found = run(installed, "4.0", SilentApi)
    assert (found["installed"], found["refusal"], found["unreadable"]) == (upstream(installed), "", False)


def test_healthy_broker_is_upgraded(run):
    assert run("4.0.5-8", "4.1")["refusal"] == ""


def test_alarm_prevents_an_upgrade(run):
    class AlarmedApi(Api):
        def health(self, check):
            return {"status": "failed", "alarms": [ALARM]}

    assert run("4.0.5-8", "4.1", AlarmedApi)["refusal"] == "The node rabbit@mq1 has a memory alarm."


def test_old_machine_version_prevents_an_upgrade(run):
    expected = "The queues mail in shop have an old machine version. Restart the node of each queue's leader."
    found = run("4.0.5-8", "4.1", machine_version=5)
    assert found["refusal"] == expected
    assert not found["migration"]


def test_broker_that_does_not_answer_prevents_an_upgrade(run):
    expected = "The broker must run before its upgrade, so that its queues can be checked. No answer."
    assert run("4.0.5-8", "4.1", SilentApi)["refusal"] == expected


def test_unreadable_data_is_reported(run, tmp_path):
    (tmp_path / "rabbit@mq1-feature_flags").write_text(FLAGS_OF_310)
    found = run("4.0.5-8", "4.0")
    assert found["unreadable"]
    assert found["migration"]
    assert "does not start with it" in found["refusal"]
    found = run("3.10.8-1.1", "4.0")
    assert not found["unreadable"]
    assert found["migration"]
    assert "which can read the data of 3.13, 4.0 only" in found["refusal"]


# The migration

EXPORT = {
    "rabbit_version": "3.10.8",
    "users": [{"name": "guest"}, {"name": "admin", "password_hash": "x"}, {"name": "old", "password_hash": "y"}],
    "permissions": [{"user": "guest", "vhost": "/"}, {"user": "old", "vhost": "shop"}],
    "global_parameters": [{"name": "internal_cluster_id", "value": "x"}, {"name": "cluster_name", "value": "shop"}],
    "policies": [
        {"name": "mirrored", "vhost": "shop", "definition": {"ha-mode": "all", "ha-sync-mode": "automatic"}},
        {"name": "limited", "vhost": "shop", "definition": {"ha-mode": "all", "max-length": 5}},
    ],
    "queues": [{"name": "a", "vhost": "shop", "durable": True}, {"name": "b", "vhost": "shop", "durable": False}],
    "bindings": [{"source": "x", "vhost": "shop", "destination": "a", "destination_type": "queue", "routing_key": "k"}],
}


def test_definitions_are_adapted_to_the_new_broker():
    found = rabbitmq_migration.rabbitmq_migrated_definitions(EXPORT, "admin")
    assert found == {
        "users": [{"name": "old", "password_hash": "y"}],
        "permissions": [{"user": "old", "vhost": "shop"}],
        "global_parameters": [{"name": "cluster_name", "value": "shop"}],
        "policies": [{"name": "limited", "vhost": "shop", "definition": {"max-length": 5}}],
        "queues": [{"name": "a", "vhost": "shop", "durable": True}],
        "bindings": EXPORT["bindings"],
    }
    assert rabbitmq_migration.rabbitmq_not_migrated(EXPORT, found) == [
        "users guest",
        "users admin",
        "permissions guest in /",
        "global_parameters internal_cluster_id",
        "policies mirrored in shop",
        "policies limited in shop",
        "queues b in shop",
    ]


def test_absent_objects_are_named_and_different_ones_are_not():
    found = {"users": [{"name": "old", "password_hash": "other"}], "bindings": [{**EXPORT["bindings"][0], "routing_key": "l"}]}
    wanted = {"users": [{"name": "old"}], "bindings": EXPORT["bindings"], "queues": [{"name": "a", "vhost": "shop"}]}
    assert rabbitmq_migration.rabbitmq_absent_definitions(wanted, found) == ["bindings x a queue k in shop", "queues a in shop"]


def test_lost_messages_are_counted_and_named():
    results = [
        {"item": "/", "stdout": "[]"},
        {"item": "shop", "stdout": '[{"name": "a", "messages": 600}, {"name": "b", "messages": 0}, {"name": "c", "messages": 2}]'},
    ]
    assert rabbitmq_migration.rabbitmq_losses(results) == "602 messages would be lost: 600 in a of shop, 2 in c of shop."
    assert rabbitmq_migration.rabbitmq_losses(results[:1]) == "All queues are empty, so no message would be lost."
