"""Tests the variables in inventories/common for inventories with one host and with several hosts."""

from __future__ import annotations

import json

import pytest
from helpers import MARK, common_variables, playbook

WORKERS = [f"worker{number}" for number in range(1, 7)]
MANY = {
    "broker": ["mq1"],
    "database": ["mq1"],
    "web": ["web1"],
    "workers": WORKERS,
    "app": ["web1", *WORKERS],
    "flower": ["mq1"],
}
ONE = {name: ["host1"] for name in MANY}
NAMES = (
    "postgresql_clients", "firewall_rules", "rabbitmq_listeners", "postgresql_listen_addresses", "wiring_broker_url",
    "flower_broker_url", "celery_beat", "django_migrate", "django_environment", "django_commands",
)  # fmt: skip


def wired(folder, groups, seed="0", **variables):
    """The variables of each host of an inventory."""
    inventory = folder / "inventory"
    if not inventory.exists():
        common_variables(inventory)
    hosts = {name: {"hosts": dict.fromkeys(members)} for name, members in groups.items()}
    (inventory / "hosts.json").write_text(json.dumps({"all": {"children": hosts}}))
    (inventory / "group_vars/all/30-environment.json").write_text(json.dumps(variables))
    look = {name: f"{{{{ {name} }}}}" for name in NAMES}
    (folder / "play.json").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": [{"debug": {"msg": look}}]}]))
    code, answer, output = playbook("-i", inventory, folder / "play.json", PYTHONHASHSEED=seed)
    assert code == 0, output
    return {host: result["msg"] for host, result in answer["plays"][0]["tasks"][0]["hosts"].items()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return wired(tmp_path_factory.mktemp("many"), MANY)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    (found,) = wired(tmp_path_factory.mktemp("one"), ONE).values()
    return found


def test_lists_of_hosts_have_the_same_order_in_each_run(tmp_path):
    """Ansible's set filters don't keep the order. Without sorting, pg_hba.conf would change in each run."""
    first, second = (wired(tmp_path, MANY, seed)["mq1"] for seed in ("1", "2"))
    assert first == second
    assert [client["address"] for client in first["postgresql_clients"]] == ["127.0.0.1", *sorted(["web1", *WORKERS])]


def test_one_host_listens_on_the_loopback_only(one):
    assert one["rabbitmq_listeners"] == ["127.0.0.1:5672"]
    assert one["postgresql_listen_addresses"] == ["localhost"]
    assert one["postgresql_clients"] == [{"address": "127.0.0.1", "database": "mailroom", "user": "mailroom"}]
    assert one["firewall_rules"] == []


def test_several_hosts_reach_broker_and_database(many):
    assert many["mq1"]["rabbitmq_listeners"] == ["0.0.0.0:5672"]
    assert many["mq1"]["postgresql_listen_addresses"] == ["*"]
    assert [rule["ports"] for rule in many["mq1"]["firewall_rules"]] == [[5672], [5432]]
    assert many["web1"]["firewall_rules"] == []
    assert many["worker3"]["wiring_broker_url"] == f"amqp://mailroom:{MARK}secretrabbitmqapppassword@mq1:5672/mailroom"


def test_only_web_hosts_open_ports_for_others(tmp_path):
    rules = [{"ports": [80, 443]}]
    hosts = wired(tmp_path, MANY, app_firewall_rules=rules)
    assert {host for host, values in hosts.items() if values["firewall_rules"][-1:] == rules} == {"web1"}
    assert hosts["web1"]["firewall_rules"] == rules
    assert [rule["ports"] for rule in hosts["mq1"]["firewall_rules"]] == [[5672], [5432]]


def test_single_services_run_on_one_host(many):
    assert [host for host in MANY["workers"] if many[host]["celery_beat"]] == ["worker1"]
    assert [host for host in MANY["app"] if many[host]["django_migrate"]] == ["web1"]


def test_flower_has_its_own_broker_user(many):
    assert many["mq1"]["flower_broker_url"].startswith(f"amqp://mailroom-flower:{MARK}secretrabbitmqflowerpassword@127.0.0.1:")


def test_each_setting_has_its_own_secret(many):
    environment = many["web1"]["django_environment"]
    (command,) = many["web1"]["django_commands"]
    assert environment["SECRET_KEY"] == f"{MARK}secretdjangokey"
    assert environment["METRICS_TOKEN"] == f"{MARK}secretappmetricstoken"
    assert environment["BROKER_URL"] == many["web1"]["wiring_broker_url"]
    assert environment["DATABASE_URL"] == f"postgresql://mailroom:{MARK}secretpostgresqlapppassword@mq1:5432/mailroom"
    stdin = json.loads(command["stdin"]) if isinstance(command["stdin"], str) else command["stdin"]
    assert stdin == {"username": "admin", "password": f"{MARK}secretappadminpassword", "api_key": f"{MARK}secretappapikey"}


def test_application_uses_an_external_database(tmp_path):
    elsewhere = "postgresql://shop@db.example.org/shop"
    groups = {name: hosts for name, hosts in MANY.items() if name != "database"}
    assert wired(tmp_path, groups, app_database_url=elsewhere)["web1"]["django_environment"]["DATABASE_URL"] == elsewhere
