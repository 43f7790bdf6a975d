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
    "flower_broker_url", "flower_broker_api", "flower_broker_ca_file", "rabbitmq_tls", "postgresql_tls",
    "rabbitmq_certificate_names", "rabbitmq_management_listener", "rabbitmq_nodes", "rabbitmq_distribution_address",
    "celery_beat", "django_migrate", "django_environment", "django_commands", "django_web_listen", "django_web_proxies",
    "nginx_acme_other_proxies",
    "nginx_upstreams", "nginx_static_directories", "nginx_server_names", "rabbitmq_vhosts", "rabbitmq_users",
    "rabbitmq_prometheus_listener", "flower_address", "monitoring_server", "monitoring_exporters", "monitoring_exporter_address",
    "monitoring_scrapes", "monitoring_units", "postgresql_users", "celery_workers", "django_private_environments",
    "postgresql_primary", "postgresql_standbys", "backups_databases",
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
    assert [client["address"] for client in first["postgresql_clients"]] == ["127.0.0.1", *sorted(["web1", *WORKERS])] * 2


def test_concurrency_of_a_worker_changes_without_the_list_of_workers(one, tmp_path):
    assert [(worker["name"], worker["concurrency"]) for worker in one["celery_workers"]] == [("mail", 4), ("maintenance", 1)]
    (changed,) = wired(tmp_path, ONE, app_mail_concurrency=8).values()
    assert [worker["concurrency"] for worker in changed["celery_workers"]] == [8, 1]
    assert [{**worker, "concurrency": 0} for worker in changed["celery_workers"]] == [
        {**worker, "concurrency": 0} for worker in one["celery_workers"]
    ]


def test_one_host_listens_on_the_loopback_only(one):
    assert one["rabbitmq_listeners"] == ["127.0.0.1:5672"]
    assert one["postgresql_listen_addresses"] == ["localhost"]
    assert one["postgresql_clients"] == [
        {"address": "127.0.0.1", "database": "mailroom", "user": user} for user in ("mailroom", "mailroom-next")
    ]
    assert one["firewall_rules"] == []


def test_connections_between_hosts_use_tls(many, one, tmp_path):
    for name in ("rabbitmq_tls", "postgresql_tls"):
        assert (many["mq1"][name], one[name]) == (True, False)
    assert many["mq1"]["rabbitmq_management_listener"] == "127.0.0.1:15671"
    assert (
        many["web1"]["django_environment"]["BROKER_CA_FILE"] == many["mq1"]["flower_broker_ca_file"] == "/etc/ssl/mailroom-ca.pem"
    )
    assert one["django_environment"]["BROKER_CA_FILE"] == one["flower_broker_ca_file"] == ""
    assert "sslmode" not in one["django_environment"]["DATABASE_URL"]
    # A client uses 127.0.0.1 for its own host, and the addresses of other hosts.
    assert many["mq1"]["rabbitmq_certificate_names"] == ["mq1", "localhost", "127.0.0.1"]
    # Only the database is on another host.
    assert wired(tmp_path, ONE | {"database": ["db1"]})["db1"]["postgresql_tls"]


def test_one_host_with_a_broker_elsewhere_needs_no_authority(tmp_path):
    elsewhere = {"app_broker_url": "amqps://a@mq.example.org/a", "flower_broker_url": "amqps://b@mq.example.org/a"}
    (alone,) = wired(tmp_path, {name: hosts for name, hosts in ONE.items() if name != "broker"}, **elsewhere).values()
    assert (alone["postgresql_tls"], alone["flower_broker_ca_file"]) == (False, "")


def test_several_hosts_reach_broker_and_database(many):
    assert many["mq1"]["rabbitmq_listeners"] == ["0.0.0.0:5671"]
    assert many["mq1"]["postgresql_listen_addresses"] == ["*"]
    assert [rule["ports"] for rule in many["mq1"]["firewall_rules"]] == [[5671], [5432]]
    assert many["web1"]["firewall_rules"] == []
    assert many["worker3"]["wiring_broker_url"] == f"amqps://mailroom:{MARK}secretrabbitmqapppassword@mq1:5671/mailroom"


def test_every_client_has_the_urls_of_all_brokers(tmp_path):
    brokers = ["mq1", "mq2", "mq3.example"]
    hosts = wired(tmp_path, MANY | {"broker": brokers, "flower": ["mq2"], "database": ["db1"]}, seed="1")
    again = wired(tmp_path, MANY | {"broker": brokers, "flower": ["mq2"], "database": ["db1"]}, seed="2")
    assert hosts == again
    # Only IPv4 addresses are listed; the hosts resolve the inventory's names.
    assert hosts["mq1"]["rabbitmq_nodes"] == [{"name": name, "address": ""} for name in brokers]
    assert hosts["mq1"]["rabbitmq_distribution_address"] == "0.0.0.0"  # noqa: S104 - a firewall closes the ports
    account = f"amqps://mailroom:{MARK}secretrabbitmqapppassword@"
    first_choices = set()
    for worker in WORKERS:
        urls = hosts[worker]["wiring_broker_url"].split(";")
        assert sorted(urls) == [f"{account}{broker}:5671/mailroom" for broker in brokers]
        first_choices.add(urls[0])
    assert len(first_choices) > 1
    flower = hosts["mq2"]["flower_broker_url"].split(";")
    assert flower[0].endswith("@127.0.0.1:5671/mailroom")
    assert len(flower) == 3
    assert "https://" in hosts["mq2"]["flower_broker_api"] and "@127.0.0.1:15671/" in hosts["mq2"]["flower_broker_api"]
    rules = hosts["mq1"]["firewall_rules"]
    assert {"ports": [4369, 25672, *range(35672, 35683)], "sources": ["mq2", "mq3.example"]} in rules


def test_cluster_lists_addresses(tmp_path):
    folder = tmp_path / "inventory"
    common_variables(folder)
    for number in (1, 2, 3):
        file = folder / f"host_vars/mq{number}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"service_address": f"192.0.2.{number}"}))
    hosts = wired(tmp_path, MANY | {"broker": ["mq1", "mq2", "mq3"]})
    assert hosts["mq2"]["rabbitmq_nodes"] == [{"name": f"mq{number}", "address": f"192.0.2.{number}"} for number in (1, 2, 3)]
    assert hosts["web1"]["rabbitmq_nodes"] == hosts["mq2"]["rabbitmq_nodes"]


def test_one_broker_has_no_cluster_settings(many, one):
    for values in (many["mq1"], one):
        assert values["rabbitmq_nodes"] == []
        assert values["rabbitmq_distribution_address"] == "127.0.0.1"


def test_only_web_hosts_open_ports_for_others(tmp_path):
    rules = [{"ports": [80, 443]}]
    hosts = wired(tmp_path, MANY, app_firewall_rules=rules)
    assert {host for host, values in hosts.items() if values["firewall_rules"][-1:] == rules} == {"web1"}
    assert hosts["web1"]["firewall_rules"] == rules
    assert [rule["ports"] for rule in hosts["mq1"]["firewall_rules"]] == [[5671], [5432]]


def test_single_services_run_on_one_host(many):
    assert [host for host in MANY["workers"] if many[host]["celery_beat"]] == ["worker1"]
    assert [host for host in MANY["app"] if many[host]["django_migrate"]] == ["web1"]


USERS = ["mailroom", "mailroom-worker", "mailroom-beat", "mailroom-flower", "mailroom-monitoring"]
PASSWORDS = dict(zip(USERS, ["app", "worker", "beat", "flower", "monitoring"], strict=True))


def test_each_kind_of_service_has_its_own_broker_user(many, one):
    assert many["mq1"]["flower_broker_url"].startswith(f"amqps://mailroom-flower:{MARK}secretrabbitmqflowerpassword@127.0.0.1:")
    for kind, user in (("web", "mailroom"), ("worker", "mailroom-worker"), ("beat", "mailroom-beat")):
        url = f"amqp://{user}:{MARK}secretrabbitmq{PASSWORDS[user]}password@127.0.0.1:5672/mailroom"
        assert one["django_private_environments"][kind] == {"BROKER_URL": url}
    assert {user["name"]: user["password"] for user in one["rabbitmq_users"]} == {
        user: f"{MARK}secretrabbitmq{name}password" for user, name in PASSWORDS.items()
    }


def test_host_has_only_the_passwords_of_its_own_services(many):
    accounts = {host: many[host]["django_private_environments"] for host in MANY["app"]}
    kinds = {host: {kind for kind, variables in accounts[host].items() if variables} for host in accounts}
    assert kinds.pop("web1") == {"web"} and kinds.pop("worker1") == {"web", "worker", "beat"}
    assert list(kinds.values()) == [{"web", "worker"}] * (len(WORKERS) - 1)
    # The set of keys is part of a release's name, so it is the same on all hosts.
    assert all(set(each) == {"web", "worker", "beat"} for each in accounts.values())
    # The build and the management commands have no password of the broker.
    assert all("BROKER_URL" not in many[host]["django_environment"] for host in MANY["app"])


def test_broker_users_have_only_the_permissions_of_their_services(one):
    """The scenario `attacks` tries the actions that these permissions forbid."""
    users = {user["name"]: user for user in one["rabbitmq_users"]}
    writes = {
        name: [(entry["exchange"], entry.get("write", "")) for entry in users[name].get("topic_permissions", [])] for name in USERS
    }
    assert writes == {
        "mailroom": [("emails", r"^mail\.v[0-9]+$")],
        "mailroom-worker": [("emails", "")],
        "mailroom-beat": [("emails", r"^maintenance\.v[0-9]+$")],
        "mailroom-flower": [],
        "mailroom-monitoring": [],
    }
    for name in ("mailroom", "mailroom-beat"):
        assert users[name]["permissions"] == [{"vhost": "mailroom", "write": "^emails$"}]
    assert users["mailroom-monitoring"]["permissions"] == [{"vhost": "mailroom"}]
    assert {name: user.get("tags", []) for name, user in users.items() if "tags" in user} == {
        "mailroom-flower": ["monitoring"],
        "mailroom-monitoring": ["monitoring"],
    }


def test_database_with_a_standby(tmp_path):
    hosts = wired(tmp_path, ONE | {"database": ["db1", "db2"]}, firewall_enabled=True)
    url = hosts["host1"]["django_environment"]["DATABASE_URL"]
    assert "@db1,db2:5432/mailroom?sslmode=verify-full&" in url
    assert url.endswith("&target_session_attrs=read-write&connect_timeout=2")
    primary, standby = hosts["db1"], hosts["db2"]
    assert (primary["postgresql_primary"], primary["postgresql_standbys"]) == ("", [{"name": "db2", "address": "db2"}])
    assert (standby["postgresql_primary"], standby["postgresql_standbys"]) == ("db1", [])
    assert primary["postgresql_tls"] and standby["postgresql_tls"]
    # After a promotion, the standby has the same clients.
    assert primary["postgresql_clients"] == standby["postgresql_clients"]
    (rule,) = [rule for rule in standby["firewall_rules"] if 5432 in rule["ports"]]
    assert "db1" in rule["sources"]
    assert primary["backups_databases"] == ["mailroom"] and standby["backups_databases"] == []


def test_inventory_names_the_new_primary_after_a_promotion(tmp_path):
    hosts = wired(tmp_path, ONE | {"database": ["db1", "db2"]}, wiring_database="db2")
    assert (hosts["db1"]["postgresql_primary"], hosts["db2"]["postgresql_primary"]) == ("db2", "")
    assert hosts["db2"]["postgresql_standbys"] == [{"name": "db1", "address": "db1"}]


def test_each_setting_has_its_own_secret(many):
    environment = many["web1"]["django_environment"]
    (command,) = many["web1"]["django_commands"]
    assert environment["SECRET_KEY"] == f"{MARK}secretdjangokey"
    assert environment["METRICS_TOKEN"] == f"{MARK}secretappmetricstoken"
    tls = "?sslmode=verify-full&sslrootcert=/etc/ssl/mailroom-ca.pem"
    assert environment["DATABASE_URL"] == f"postgresql://mailroom:{MARK}secretpostgresqlapppassword@mq1:5432/mailroom{tls}"
    stdin = json.loads(command["stdin"]) if isinstance(command["stdin"], str) else command["stdin"]
    assert stdin == {"username": "admin", "password": f"{MARK}secretappadminpassword", "api_key": f"{MARK}secretappapikey"}


def test_application_uses_an_external_broker(tmp_path):
    elsewhere, flower = "amqps://shop@mq.example.org/shop", "amqps://shop-flower@mq.example.org/shop"
    groups = {name: hosts for name, hosts in MANY.items() if name != "broker"}
    hosts = wired(tmp_path, groups, app_broker_url=elsewhere, flower_broker_url=flower)
    urls = [
        accounts["BROKER_URL"]
        for host in MANY["app"]
        for accounts in hosts[host]["django_private_environments"].values()
        if accounts
    ]
    assert set(urls) == {elsewhere}
    assert len(urls) == len(MANY["app"]) + len(WORKERS) + 1
    assert (hosts["mq1"]["flower_broker_url"], hosts["mq1"]["flower_broker_api"]) == (flower, "")
    assert {hosts[host]["django_environment"]["BROKER_CA_FILE"] for host in MANY["app"]} == {""}
    assert hosts["mq1"]["flower_broker_ca_file"] == ""
    assert [rule["ports"] for rule in hosts["mq1"]["firewall_rules"]] == [[5432]]


def test_broker_and_database_accept_a_guest(tmp_path):
    guest = {"name": "shop", "broker_password": f"{MARK}1", "database_password": f"{MARK}2", "addresses": ["192.0.2.7"]}
    (alone,) = wired(tmp_path, ONE, wiring_guests=[guest]).values()
    assert alone["rabbitmq_tls"] and alone["postgresql_tls"]
    assert alone["rabbitmq_listeners"] == ["0.0.0.0:5671"]
    assert alone["postgresql_listen_addresses"] == ["*"]
    assert alone["firewall_rules"] == [{"ports": [5671], "sources": ["192.0.2.7"]}, {"ports": [5432], "sources": ["192.0.2.7"]}]
    clients = [(entry["user"], entry["address"]) for entry in alone["postgresql_clients"]]
    assert clients == [("mailroom", "127.0.0.1"), ("mailroom-next", "127.0.0.1"), ("shop", "127.0.0.1"), ("shop", "192.0.2.7")]
    assert [entry["name"] for entry in alone["rabbitmq_vhosts"]] == ["mailroom", "shop"]
    assert [entry["name"] for entry in alone["rabbitmq_users"]] == [*USERS, "shop"]


def test_guest_on_the_same_host_opens_no_port(tmp_path):
    guest = {"name": "shop", "broker_password": f"{MARK}1", "database_password": f"{MARK}2"}
    (alone,) = wired(tmp_path, ONE, wiring_guests=[guest]).values()
    assert (alone["rabbitmq_listeners"], alone["postgresql_listen_addresses"]) == (["127.0.0.1:5672"], ["localhost"])
    assert alone["firewall_rules"] == []


def test_application_uses_an_external_database(tmp_path):
    elsewhere = "postgresql://shop@db.example.org/shop"
    groups = {name: hosts for name, hosts in MANY.items() if name != "database"}
    assert wired(tmp_path, groups, app_database_url=elsewhere)["web1"]["django_environment"]["DATABASE_URL"] == elsewhere


# The proxy

STATIC = [{"path": "/static/", "directory": "/opt/mailroom/current/staticfiles"}]
PROXY = [{"ports": [80, 443]}]


def test_without_a_proxy_the_web_service_is_on_the_loopback(many, one):
    for host in (many["web1"], one):
        assert (host["django_web_listen"], host["django_web_proxies"]) == (["127.0.0.1:8000"], [])
    assert one["firewall_rules"] == []


def test_proxy_on_the_only_web_host_uses_the_loopback(tmp_path):
    (host,) = wired(tmp_path, {**ONE, "proxy": ["host1"]}).values()
    assert (host["django_web_listen"], host["nginx_upstreams"]) == (["127.0.0.1:8000"], ["127.0.0.1:8000"])
    assert host["nginx_static_directories"] == STATIC
    assert host["nginx_server_names"] == ["host1", "localhost", "127.0.0.1"]
    assert host["firewall_rules"] == PROXY


def test_proxy_on_another_host_reaches_all_web_hosts(tmp_path):
    groups = {**MANY, "web": ["web1", "web2"], "app": ["web1", "web2", *WORKERS], "proxy": ["proxy1"]}
    hosts = wired(tmp_path, groups, app_allowed_hosts=["*"])
    proxy = hosts["proxy1"]
    assert proxy["nginx_upstreams"] == ["web1:8000", "web2:8000"]
    assert (proxy["nginx_static_directories"], proxy["nginx_server_names"]) == ([], [])
    assert proxy["firewall_rules"] == PROXY
    for name in ("web1", "web2"):
        assert (hosts[name]["django_web_listen"], hosts[name]["django_web_proxies"]) == (["0.0.0.0:8000"], ["proxy1"])
        assert hosts[name]["firewall_rules"] == [{"ports": [8000], "sources": ["proxy1"]}]
    assert hosts["worker1"]["firewall_rules"] == []


def test_each_proxy_knows_the_others(tmp_path):
    hosts = wired(tmp_path, {**MANY, "proxy": ["proxy1", "proxy2", "proxy3"]})
    assert hosts["proxy2"]["nginx_acme_other_proxies"] == ["proxy1", "proxy3"]
    assert wired(tmp_path, {**ONE, "proxy": ["host1"]})["host1"]["nginx_acme_other_proxies"] == []


def test_proxy_on_one_of_several_web_hosts_uses_its_loopback_and_the_other_host(tmp_path):
    groups = {**MANY, "web": ["web1", "web2"], "app": ["web1", "web2", *WORKERS], "proxy": ["web1"]}
    hosts = wired(tmp_path, groups)
    assert hosts["web1"]["nginx_upstreams"] == ["127.0.0.1:8000", "web2:8000"]
    assert (hosts["web1"]["django_web_listen"], hosts["web2"]["django_web_listen"]) == (["127.0.0.1:8000"], ["0.0.0.0:8000"])
    assert hosts["web2"]["firewall_rules"] == [{"ports": [8000], "sources": ["web1"]}]


def test_without_monitoring_nothing_is_installed_or_opened(many, one):
    for values in (*many.values(), one):
        assert not values["monitoring_server"] and values["monitoring_exporters"] == [] and values["monitoring_scrapes"] == []
        assert values["rabbitmq_prometheus_listener"] == "127.0.0.1:15692"
        assert values["flower_address"] == "127.0.0.1"
        assert [user["name"] for user in values["postgresql_users"]] == ["mailroom", "mailroom-next"]


def test_only_the_monitoring_host_reaches_the_metrics_of_the_others(tmp_path):
    hosts = wired(tmp_path, MANY | {"monitoring": ["mon1"]})
    opened = {host: values["firewall_rules"][-1:] for host, values in hosts.items()}
    assert opened["mq1"] == [{"ports": [5555, 9100, 9187, 15692], "sources": ["mon1"]}]
    assert opened["web1"] == [{"ports": [8000, 9100], "sources": ["mon1"]}]
    assert opened["worker1"] == [{"ports": [9100], "sources": ["mon1"]}]
    assert opened["mon1"] == []
    everywhere = "0.0.0.0"  # noqa: S104 - a firewall closes the ports
    assert hosts["mq1"]["rabbitmq_prometheus_listener"] == f"{everywhere}:15692"
    assert hosts["web1"]["django_web_listen"] == [f"{everywhere}:8000"]
    assert "web1" in hosts["web1"]["django_environment"]["ALLOWED_HOSTS"]
    assert [host for host in hosts if hosts[host]["monitoring_server"]] == ["mon1"]
    assert hosts["mq1"]["monitoring_exporters"] == ["node", "postgresql"]
    assert hosts["mon1"]["monitoring_exporters"] == ["node"]
    assert hosts["mon1"]["monitoring_exporter_address"] == "127.0.0.1"
    scraped = {entry["job"]: [target["address"] for target in entry["targets"]] for entry in hosts["mon1"]["monitoring_scrapes"]}
    assert scraped["app"] == ["web1:8000"]
    assert scraped["rabbitmq"] == scraped["rabbitmq-queues"] == ["mq1:15692"]
    assert scraped["node"] == ["127.0.0.1:9100", "mq1:9100", "web1:9100", *(f"{worker}:9100" for worker in WORKERS)]
    assert "mailroom-relay[.]service" in hosts["web1"]["monitoring_units"]


def test_monitoring_on_the_only_host_opens_nothing(tmp_path):
    variables = {"wiring_monitoring_clients": ["192.0.2.0/24"], "app_allowed_hosts": ["mail.example.org"]}
    hosts = wired(tmp_path, ONE | {"monitoring": ["host1"]}, **variables)
    assert hosts["host1"]["django_environment"]["ALLOWED_HOSTS"] == ["mail.example.org", "127.0.0.1"]
    assert hosts["host1"]["firewall_rules"] == [{"ports": [9090, 9093], "sources": ["192.0.2.0/24"]}]
    assert hosts["host1"]["django_web_listen"] == ["127.0.0.1:8000"]
    assert hosts["host1"]["monitoring_exporter_address"] == "127.0.0.1"
    assert {target["address"] for entry in hosts["host1"]["monitoring_scrapes"] for target in entry["targets"]} == {
        f"127.0.0.1:{port}" for port in (5555, 8000, 9100, 9187, 15692)
    }
