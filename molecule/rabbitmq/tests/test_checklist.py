"""Tests each item in RabbitMQ's production checklist that applies to a single node."""

from __future__ import annotations

import json
import re

import pytest


@pytest.fixture(scope="module")
def root(host):
    """Runs a command as root; the command must succeed. Returns its output."""

    def run(command):
        with host.sudo():
            return host.check_output(command)

    return run


@pytest.fixture(scope="module")
def environment(root):
    """The node's effective settings as Erlang terms."""
    return root("rabbitmqctl --quiet environment")


@pytest.fixture(scope="module")
def ask(root):
    """Evaluates an Erlang expression in the node."""
    return lambda expression: root(f"rabbitmqctl --quiet eval '{expression}'")


# The node


@pytest.mark.parametrize("check", ["check_running", "check_local_alarms", "check_port_connectivity", "check_virtual_hosts"])
def test_health_checks_pass(root, check):
    root(f"rabbitmq-diagnostics --quiet {check}")


def test_service_is_enabled_and_runs_as_its_user(root):
    assert root("systemctl is-enabled rabbitmq-server") == "enabled"
    pid = root("systemctl show --property MainPID --value rabbitmq-server")
    assert root(f"ps -o user= -p {pid}") == "rabbitmq"


def test_user_has_no_shell(root):
    home, shell = root("getent passwd rabbitmq").split(":")[-2:]
    assert (home, shell) == ("/var/lib/rabbitmq", "/usr/sbin/nologin")


def test_versions_are_pinned(api):
    found = api("overview")
    assert found["rabbitmq_version"].startswith("4.0.")
    assert found["erlang_version"].startswith("27.")


def test_port_limit_is_not_below_the_file_limit(ask, variables):
    assert int(ask("erlang:system_info(port_limit).")) >= max(variables["rabbitmq_open_files"], 65536)


@pytest.mark.parametrize(
    ("path", "owner", "modes"),
    [
        ("/var/lib/rabbitmq", "rabbitmq:rabbitmq", ["750", "755"]),
        ("/var/lib/rabbitmq/.erlang.cookie", "rabbitmq:rabbitmq", ["400", "600"]),
        ("/etc/rabbitmq/rabbitmq.conf", "root:rabbitmq", ["640"]),
        ("/etc/rabbitmq/definitions.json", "root:rabbitmq", ["640"]),
    ],
)
def test_files_are_accessible_to_the_broker_only(root, path, owner, modes):
    found, mode = root(f"stat --format '%U:%G %a' {path}").split()
    assert found == owner
    assert mode in modes


def test_cookie_is_long(root):
    assert int(root("stat --format %s /var/lib/rabbitmq/.erlang.cookie")) >= 20


def test_watermarks(environment, ask, root):
    relative = float(re.search(r"{vm_memory_high_watermark,([0-9.]+)}", environment)[1])
    assert 0.4 <= relative <= 0.7
    assert "{vm_memory_calculation_strategy,rss}" in environment
    memory = int(ask("vm_memory_monitor:get_memory_limit()."))
    # The scenario limits the broker to 70 % of the host's memory. The watermark is 60 % of this limit.
    total = int(root("awk '/MemTotal/ {print $2 * 1024}' /proc/meminfo"))
    limit = int(root("systemctl show --property=MemoryMax --value rabbitmq-server"))
    assert limit == pytest.approx(0.7 * total, rel=0.001)
    assert memory == pytest.approx(0.6 * limit, rel=0.001)
    # The broker may have to write all of its memory to the disk. Both limits are rounded fractions of the same memory.
    assert int(ask("rabbit_disk_monitor:get_disk_free_limit().")) >= memory * 0.99


@pytest.mark.parametrize(
    ("setting", "least", "most"),
    [
        ("channel_max", 16, 128),
        ("consumer_max_per_channel", 1, 1000),
        ("max_message_size", 2**20, 2**24),
        ("connection_max", 1, 8192),
    ],
)
def test_node_limits(environment, setting, least, most):
    assert least <= int(re.search(rf"{{{setting},([0-9]+)}}", environment)[1]) <= most


def test_data_is_on_a_local_file_system(root):
    assert not root("stat --file-system --format %T /var/lib/rabbitmq").startswith(("nfs", "fuse"))


# Users


def test_administrators_and_application_users_are_separate(api):
    users = {user["name"]: user["tags"] for user in api("users")}
    assert users == {"admin": ["administrator"], "mailroom": [], "mailroom-flower": ["monitoring"]}


def test_guest_cannot_authenticate(host):
    with host.sudo():
        result = host.run("rabbitmqctl --quiet authenticate_user guest guest")
    assert result.rc != 0
    assert "invalid credentials" in result.stderr


def test_anonymous_login_is_disabled(environment):
    assert "{anonymous_login_user,none}" in environment
    (mechanisms,) = re.findall(r"{auth_mechanisms,\[([^]]*)\]}", environment)
    assert "ANONYMOUS" not in mechanisms
    assert '{loopback_users,[<<"guest">>]}' in environment


def test_passwords_are_hashed(environment, api):
    assert "{password_hashing_module,rabbit_password_hashing_sha256}" in environment
    found = {user["hashing_algorithm"] for user in api("definitions")["users"]}
    assert found <= {"rabbit_password_hashing_sha256", "rabbit_password_hashing_sha512"}


def test_application_users_can_access_only_their_virtual_host(api):
    found = {(entry["user"], entry["vhost"]) for entry in api("permissions") if entry["user"] != "admin"}
    assert found == {("mailroom", "mailroom"), ("mailroom-flower", "mailroom")}


def test_limits_of_virtual_hosts_and_users(api):
    assert api("vhost-limits/mailroom")[0]["value"].keys() == {"max-connections", "max-queues"}
    for user in ("mailroom", "mailroom-flower"):
        assert api(f"user-limits/{user}")[0]["value"].keys() == {"max-connections", "max-channels"}


def test_queues_are_quorum_queues_by_default(environment, api):
    assert "{default_queue_type,rabbit_quorum_queue}" in environment
    assert [vhost["default_queue_type"] for vhost in api("vhosts")] == ["quorum"]


# Network


def test_listening_ports(root):
    listening = {line.split()[3] for line in root("ss --tcp --listening --numeric --no-header").splitlines()}
    addresses = {}
    for entry in listening:
        address, _, port = entry.rpartition(":")
        addresses.setdefault(port, set()).add(address)
    # Erlang's port mapper, its distribution and the metrics. The scenario opens 5672 and 15672.
    for port in ("4369", "25672", "15692"):
        # A port mapper that the node starts also listens on the loopback's IPv6 address.
        assert "127.0.0.1" in addresses[port] and addresses[port] <= {"127.0.0.1", "[::1]"}, port


def test_node_name_resolves_to_the_loopback_for_erlang_only(root):
    """The network resolves the name to another address.

    With that address, tools could not reach a distribution port on the loopback address.
    """
    assert not root("getent hosts $(hostname)").startswith("127.")
    root("rabbitmqctl --quiet await_startup")


def test_metrics_are_available(root):
    metrics = root("python3 -c \"import urllib.request as r; print(r.urlopen('http://127.0.0.1:15692/metrics').read().decode())\"")
    assert "rabbitmq_identity_info" in metrics


def test_other_addresses_are_denied(root, is_el):
    """The test hosts' kernel does not enforce this limit."""
    expected = {
        "IPAddressAllow": {"127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"},
        "IPAddressDeny": {"0.0.0.0/0", "::/0"},
    }
    # Only Debian's package has the socket of the port mapper.
    for unit in ["rabbitmq-server.service"] if is_el else ["rabbitmq-server.service", "epmd.service", "epmd.socket"]:
        shown = root(f"systemctl show --property=IPAddressDeny,IPAddressAllow {unit}")
        found = {name: set(addresses.split()) for name, addresses in (line.split("=") for line in shown.splitlines())}
        assert found == expected, unit


# Feature flags and deprecated features


def test_stable_feature_flags_are_enabled(api):
    flags = api("feature-flags")
    assert len(flags) > 20
    assert [flag["name"] for flag in flags if flag["stability"] in ("stable", "required") and flag["state"] != "enabled"] == []


def test_deprecated_features_are_not_used_and_not_permitted(root):
    root("rabbitmq-diagnostics --quiet check_if_any_deprecated_features_are_used")
    settings = root("cat /etc/rabbitmq/rabbitmq.conf")
    assert re.findall(r"^deprecated_features.permit.\w+ = true$", settings, re.MULTILINE) == []
    assert len(re.findall(r"^deprecated_features.permit.\w+ = false$", settings, re.MULTILINE)) == 5
    # The setting has no effect since 4.3, and a single node does not need the setting.
    assert "cluster_partition_handling" not in settings


# Plugins, logs, definitions


def test_enabled_plugins_are_the_listed_ones(root, variables):
    assert set(root("rabbitmq-plugins list -E -m -q").split()) == set(variables["rabbitmq_plugins"])


def test_broker_rotates_its_log(ask, root):
    """A host may not have logrotate, which the package's rules need."""
    handlers = ask("[maps:get(config, H) || H <- logger:get_handler_config()].")
    file = re.search(r"type => file.*?}", handlers, re.DOTALL)[0]
    assert re.search(r"max_no_bytes => 10485760\b", file)
    assert re.search(r"max_no_files => 10\b", file)
    assert "[info]" in root("cat /var/log/rabbitmq/rabbit@*.log")


def test_definitions_are_imported_once_and_contain_hashes(environment, root, api):
    assert "{skip_if_unchanged,true}" in environment
    (user,) = json.loads(root("cat /etc/rabbitmq/definitions.json"))["users"]
    (running,) = [user for user in api("definitions")["users"] if user["name"] == "admin"]
    assert user["password_hash"] == running["password_hash"]
