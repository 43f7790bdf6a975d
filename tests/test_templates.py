"""Tests the rendered templates. One playbook run renders all templates, with one host per set of variables."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml
from helpers import MARK, ROOT, common_variables, playbook
from test_services import HARDENING, PER_SERVICE, sections

# Values that an inventory derives from its groups. This inventory has no such groups.
WIRED = {
    "service_address": "localhost",
    "wiring_tls": False,
    "rabbitmq_listeners": ["127.0.0.1:5672"],
    "rabbitmq_nodes": [],
    "rabbitmq_distribution_address": "127.0.0.1",
    "app_broker_url": f"amqp://{MARK}",
    "flower_broker_url": f"amqp://{MARK}",
    "flower_broker_api": "",
    "django_migrate": True,
    "django_web": True,
    "celery_beat": True,
}
HOSTS = {
    "usual": {},
    "other": {
        "rabbitmq_listeners": ["[::]:5673", "127.0.0.1:5674"],
        "rabbitmq_management_listener": "[::1]:15673",
        "rabbitmq_plugins": ["rabbitmq_shovel", "rabbitmq_management"],
        "rabbitmq_permitted_deprecated_features": ["transient_nonexcl_queues", "global_qos"],
        "rabbitmq_settings": {"channel_max": 64, "log.console": True, "ssl_options.verify": "verify_peer"},
        "rabbitmq_open_files": 100000,
        "rabbitmq_distribution_address": "192.0.2.1",
        "rabbitmq_disk_free_limit": "2GB",
        "rabbitmq_memory_max": "2G",
        "rabbitmq_allowed_addresses": ["192.0.2.0/24"],
        "rabbitmq_memory_high_watermark": 0.5,
        "django_web_listen": ["[::1]:8001", "/run/other.sock"],
        "django_web_timeout": 60,
        "django_processes": [
            {"name": "say", "command": ["/bin/echo", "100% of $HOME", 'a "b"'], "stop_timeout": 5, "memory_max": "64M"}
        ],
        "celery_workers": [{"name": "slow", "queues": ["a", "b"], "time_limit": 900, "pool": "solo", "readiness": "notify"}],
        "celery_beat": False,
        "django_environment": {"LIST": ["a", "b"], "QUOTE": "it's", "TRUTH": False},
    },
    # Variables that no scenario sets.
    "alternative": {
        "celery_user": "tasks",
        "celery_directory": "/srv/tasks",
        "celery_environment_file": "/srv/tasks.env",
        "celery_worker_environment_file": "/srv/worker.env",
        "celery_log_level": "DEBUG",
        "django_web_workers": 7,
        "django_web_threads": 9,
        "django_collectstatic": False,
        "flower_url_prefix": "flower",
        "flower_read_only": True,
        "flower_max_tasks": 123,
        "flower_memory_max": "99M",
        "valkey_port": 6380,
        "valkey_eviction": "allkeys-lfu",
        "valkey_persistent": False,
    },
    "cluster": {
        "rabbitmq_nodes": [
            {"name": "mq1", "address": "192.0.2.1"},
            {"name": "mq2.example", "address": "192.0.2.2"},
            {"name": "mq3"},
        ],
        "rabbitmq_node_name": "mq2.example",
        "rabbitmq_distribution_address": "0.0.0.0",  # noqa: S104 - a firewall closes the ports
        "rabbitmq_stop_wait": 60,
        "rabbitmq_memory_max": "50%",
    },
    "tls": {
        "rabbitmq_tls": True,
        "rabbitmq_listeners": ["0.0.0.0:5671"],
        "rabbitmq_management_listener": "127.0.0.1:15671",
        "flower_broker_url": "amqps://broker.example",
        "flower_broker_ca_file": "/etc/ssl/ca.pem",
        "valkey_tls": True,
    },
    "worker alone": {"django_web": False, "django_processes": [], "celery_beat": False},
}
ROLES = ("services", "rabbitmq", "django", "celery", "flower")
TEMPLATES = {
    "rabbitmq.conf": "rabbitmq/templates/rabbitmq.conf.j2",
    "rabbitmq-env.conf": "rabbitmq/templates/rabbitmq-env.conf.j2",
    "erl_inetrc": "rabbitmq/templates/erl_inetrc.j2",
    "enabled_plugins": "rabbitmq/templates/enabled_plugins.j2",
    "definitions.json": "rabbitmq/templates/definitions.json.j2",
    "environment": "django/templates/environment.j2",
    "manage": "django/templates/manage.j2",
    "celeryconfig.py": "flower/templates/celeryconfig.py.j2",
    "valkey.conf": "valkey/templates/valkey.conf.j2",
}
# Expressions whose value a role writes to a file or runs, without a template.
EXPRESSIONS = {
    "flower.environment": "{{ __flower_environment | django_celery.stack.environment_file }}",
    "release steps": "{{ __django_release_steps }}",
}
# Directives of HARDENING that a packaged unit does not get.
OWN_UNITS = {"Restart", "RestartSec", "KillMode", "OOMPolicy", "UMask"}
NO_UNITS = {*TEMPLATES, *EXPRESSIONS}

# Facts, since the play contacts no host.
FACTS = {"set_fact": {"hostname": "node", "os_family": "Debian", "cacheable": True}}


def services_of(role):
    """The variables that a role passes to the role services, read from its task."""
    tasks = yaml.safe_load((ROOT / f"roles/{role}/tasks/service.yml").read_text())
    return next(task["vars"] for task in tasks if "ansible.builtin.include_role" in task)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The text of each file, by host and file name."""
    folder = tmp_path_factory.mktemp("templates")
    common_variables(folder)
    # The precedence is the same as in a role: the inventory overrides defaults, and vars_files override the inventory.
    defaults = [yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text()) for role in (*ROLES, "valkey")]
    hosts = {"hosts": HOSTS, "vars": {name: value for values in defaults for name, value in values.items()}}
    (folder / "hosts.json").write_text(json.dumps({"all": hosts}))
    (folder / "group_vars/all/10-wired.json").write_text(json.dumps(WIRED))
    # Ansible looks for files next to a playbook, as in a role.
    (folder / "files").symlink_to(ROOT / "roles/flower/files")
    files = [ROOT / f"roles/{role}/vars/main{name}.yml" for role, name in (("services", ""), ("django", ""), ("celery", "/main"))]
    files += [ROOT / f"roles/{role}/vars/main.yml" for role in ("flower", "valkey")]
    files += [ROOT / f"roles/rabbitmq/vars/{name}.yml" for name in ("main/main", "Debian", "main/checklist", "main/services")]
    tasks = [{"debug": {"msg": "{{ __services_units }}"}, "vars": services_of(role)} for role in ROLES[1:]]
    tasks += [{"debug": {"msg": f"{{{{ lookup('template', '{ROOT}/roles/{source}') }}}}"}} for source in TEMPLATES.values()]
    new = {"__django_found": {"links": {}, "staged": []}, "__django_release": {"id": "new"}}
    tasks += [{"debug": {"msg": text}, "vars": new} for text in EXPRESSIONS.values()]
    play = {"hosts": "all", "gather_facts": False, "vars_files": [str(file) for file in files], "tasks": [FACTS, *tasks]}
    (folder / "play.json").write_text(json.dumps([play]))
    code, answer, output = playbook("-i", folder / "hosts.json", folder / "play.json")
    assert code == 0, output
    results = [task["hosts"] for task in answer["plays"][0]["tasks"][1:]]
    found = {}
    for host in HOSTS:
        units = [unit for result in results[: len(ROLES) - 1] for unit in result[host]["msg"]]
        texts = [result[host]["msg"] for result in results[len(ROLES) - 1 :]]
        found[host] = {unit["name"]: unit["content"] for unit in units} | dict(zip([*TEMPLATES, *EXPRESSIONS], texts, strict=True))
    return found


def settings(text):
    """The settings of a configuration file as pairs, without comments and section names."""
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    return [tuple(part.strip() for part in line.partition("=")[::2]) for line in lines]


# The broker


def test_broker_with_tls_has_no_port_without_it(rendered):
    found = dict(settings(rendered["tls"]["rabbitmq.conf"]))
    assert {name: value for name, value in found.items() if ".tcp" in name and "prometheus" not in name} == {
        "listeners.tcp": "none",
        **{name: value for name, value in found.items() if name.startswith(("tcp_listen", "cluster"))},
    }
    assert (found["listeners.ssl.1"], found["management.ssl.port"]) == ("0.0.0.0:5671", "15671")
    unit = rendered["tls"]["rabbitmq-server.service"]
    assert "ExecReload=/usr/sbin/rabbitmqctl eval 'ssl:clear_pem_cache().'" in unit
    assert "ExecReload" not in rendered["usual"]["rabbitmq-server.service"]


def test_cache_configuration(rendered):
    def lines(host):
        return rendered[host]["valkey.conf"].splitlines()

    assert {"port 6379", "maxmemory 256mb", "maxmemory-policy volatile-lru", "appendonly yes"} <= set(lines("usual"))
    assert {"port 6380", "maxmemory-policy allkeys-lfu", "appendonly no"} <= set(lines("alternative"))
    assert {"port 0", "tls-port 6379"} <= set(lines("tls"))
    assert MARK not in rendered["usual"]["valkey.conf"]


def test_flower_verifies_the_broker(rendered):
    """Kombu writes the first broker's name into the options, but the next broker has a different name."""
    values = {}
    exec(rendered["tls"]["celeryconfig.py"], values)  # noqa: S102 - a file of the role
    options = values["broker_use_ssl"]
    options["server_hostname"] = "first"
    assert options["server_hostname"] is None
    assert options["ca_certs"] == "/etc/ssl/ca.pem"
    # Flower verifies the certificate of the management API with this option.
    assert options.get("ssl_ca_certs") == "/etc/ssl/ca.pem" and options.get("keyfile") is None
    assert "\nPYTHONPATH='/opt/mailroom/flower/configuration-" in rendered["tls"]["flower.environment"]


def test_broker_configuration_by_default(rendered):
    text = rendered["usual"]["rabbitmq.conf"]
    found = dict(settings(text))
    assert len(found) == len(settings(text))
    assert found["listeners.tcp.1"] == "127.0.0.1:5672"
    assert found["management.tcp.ip"] == "127.0.0.1"
    assert found["management.tcp.port"] == "15672"
    assert found["prometheus.tcp.port"] == "15692"
    assert found["deprecated_features.permit.transient_nonexcl_queues"] == "false"
    assert found["definitions.local.path"] == "/etc/rabbitmq/definitions.json"
    assert "listeners.tcp.2" not in found
    # The broker may have to write all of its memory to the disk.
    assert float(found["disk_free_limit.relative"]) >= float(found["vm_memory_high_watermark.relative"])
    # Settings that have no effect since RabbitMQ 4.3, and features that RabbitMQ 4.3 denies.
    assert not [name for name in found if name.startswith("cluster_")]
    assert "true" not in [value for name, value in found.items() if name.startswith("deprecated_features")]


def test_cluster_does_not_deny_a_feature_whose_check_needs_the_queues(rendered):
    found = dict(settings(rendered["cluster"]["rabbitmq.conf"]))
    denied = {name for name, value in found.items() if name.startswith("deprecated_features") and value == "false"}
    assert "deprecated_features.permit.transient_nonexcl_queues" not in found
    assert denied == {
        f"deprecated_features.permit.{name}"
        for name in ("amqp_address_v1", "amqp_filter_set_bug", "global_qos", "queue_master_locator")
    }


def test_broker_configuration_with_other_variables(rendered):
    text = rendered["other"]["rabbitmq.conf"]
    found = dict(settings(text))
    assert len(found) == len(settings(text))
    assert (found["listeners.tcp.1"], found["listeners.tcp.2"]) == ("[::]:5673", "127.0.0.1:5674")
    assert (found["management.tcp.ip"], found["management.tcp.port"]) == ("::1", "15673")
    # The broker does not start if rabbitmq.conf has a setting of a plugin that is not enabled.
    assert not [name for name in found if name.startswith("prometheus")]
    assert found["deprecated_features.permit.transient_nonexcl_queues"] == "true"
    assert found["deprecated_features.permit.global_qos"] == "true"
    assert found["deprecated_features.permit.amqp_address_v1"] == "false"
    assert found["disk_free_limit.absolute"] == "2GB"
    assert "disk_free_limit.relative" not in found
    assert found["distribution.listener.interface"] == "192.0.2.1"
    # rabbitmq_settings override the role's values.
    assert found["channel_max"] == "64"
    assert found["log.console"] == "true"
    assert found["ssl_options.verify"] == "verify_peer"


@pytest.mark.parametrize(
    ("host", "memory_max", "watermark"),
    [
        # 0.6 of the memory limit, by default.
        ("usual", "80%", {"relative": "0.48"}),
        ("cluster", "50%", {"relative": "0.3"}),
        # 0.5 of 2 GiB, in bytes.
        ("other", "2G", {"absolute": "1073741824"}),
    ],
)
def test_memory_watermark_follows_the_memory_limit(rendered, host, memory_max, watermark):
    found = dict(settings(rendered[host]["rabbitmq.conf"]))
    prefix = "vm_memory_high_watermark."
    assert {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)} == watermark
    assert ("MemoryMax", memory_max) in sections(rendered[host]["rabbitmq-server.service"])["Service"]


def test_a_node_on_the_loopback_resolves_its_name_to_the_loopback(rendered):
    usual, other = (rendered[host] for host in ("usual", "other"))
    assert dict(settings(usual["rabbitmq-env.conf"]))["ERL_EPMD_ADDRESS"] == "127.0.0.1"
    assert '{host, {127, 0, 0, 1}, ["node"]}.' in usual["erl_inetrc"]
    assert usual["epmd.socket"].endswith("ListenStream=\nListenStream=127.0.0.1:4369\n")
    assert settings(other["rabbitmq-env.conf"]) == [("ERL_MAX_PORTS", "100000")]
    assert "host" not in other["erl_inetrc"].splitlines()[-1]
    limit = "IPAddressDeny=any\nIPAddressAllow=localhost 192.0.2.0/24\n"
    assert other["epmd.socket"].endswith(f"ListenStream=\nListenStream=4369\n{limit}")


def test_node_of_a_cluster_lists_the_other_nodes(rendered):
    cluster = rendered["cluster"]
    found = dict(settings(cluster["rabbitmq.conf"]))
    assert [found[f"cluster_formation.classic_config.nodes.{number}"] for number in (1, 2, 3)] == [
        "rabbit@mq1", "rabbit@mq2.example", "rabbit@mq3",
    ]  # fmt: skip
    assert found["cluster_formation.target_cluster_size_hint"] == "3"
    assert found["cluster_partition_handling"] == "pause_minority"
    environment = dict(settings(cluster["rabbitmq-env.conf"]))
    assert environment["NODENAME"] == "rabbit@mq2.example"
    assert environment["USE_LONGNAME"] == "true"
    assert "ERL_EPMD_ADDRESS" not in environment
    # The node mq3 has no address, so the operating system resolves its name.
    assert cluster["erl_inetrc"].splitlines()[2:] == [
        '{host, {192, 0, 2, 1}, ["mq1"]}.', '{host, {192, 0, 2, 2}, ["mq2.example"]}.', "{lookup, [file, native]}.",
    ]  # fmt: skip


def test_only_a_node_of_a_cluster_waits_before_it_stops(rendered):
    unit = sections(rendered["cluster"]["rabbitmq-server.service"])["Service"]
    wait, drain, stop = [value for name, value in unit if name == "ExecStop"][1:]
    assert "await_online_quorum_plus_one --timeout 60 || logger" in wait
    assert drain == "-/usr/sbin/rabbitmq-upgrade drain"
    assert stop == "/usr/sbin/rabbitmqctl stop"
    assert ("TimeoutStopSec", "180") in unit
    assert "ExecStop" not in rendered["usual"]["rabbitmq-server.service"]


def test_enabled_plugins_are_a_sorted_erlang_term(rendered):
    assert rendered["usual"]["enabled_plugins"] == "[rabbitmq_management,rabbitmq_prometheus].\n"
    assert rendered["other"]["enabled_plugins"] == "[rabbitmq_management,rabbitmq_shovel].\n"


def test_definitions_contain_only_the_administrator_and_no_clear_password(rendered):
    text = rendered["usual"]["definitions.json"]
    (user,) = json.loads(text)["users"]
    assert user["tags"] == ["administrator"]
    assert MARK not in text


# The application


def test_the_environment_file_has_one_line_per_variable(rendered):
    assert settings(rendered["other"]["environment"]) == [
        ("DJANGO_SETTINGS_MODULE", "'mailroom.settings'"),
        ("LIST", "'a,b'"),
        ("PYTHONNOUSERSITE", "'1'"),
        ("QUOTE", "'it'\\''s'"),
        ("TRUTH", "'false'"),
    ]


def test_manage_is_a_valid_shell_script(rendered, tmp_path):
    script = tmp_path / "manage"
    script.write_text(rendered["usual"]["manage"])
    subprocess.run(["sh", "-n", script], check=True)


# Units


def test_units_of_a_host(rendered):
    app = {"usual": {"web.socket", "web.service", "relay.service", "beat.service"}, "other": {"web.socket", "web.service"}}
    app["usual"] |= {"worker@mail.service", "worker@maintenance.service"}
    app["other"] |= {"say.service", "worker@slow.service"}
    app["usual"].add("web-standby.service")
    app["other"].add("web-standby.service")
    app["worker alone"] = {"worker@mail.service", "worker@maintenance.service"}
    for host, names in app.items():
        wanted = {f"mailroom-{name}" for name in names} | {"mailroom.target", "mailroom-flower.service", "rabbitmq-server.service"}
        wanted |= {"epmd.socket", "epmd.service"}
        assert set(rendered[host]) - NO_UNITS == wanted


def test_the_web_service_has_its_socket_and_time_to_finish_requests(rendered):
    unit, socket = (settings(rendered["other"][f"mailroom-web.{kind}"]) for kind in ("service", "socket"))
    assert [value for name, value in socket if name == "ListenStream"] == ["[::1]:8001", "/run/other.sock"]
    assert ("Requires", "mailroom-web.socket") in unit
    assert ("Type", "notify") in unit
    assert ("TimeoutStopSec", "70") in unit
    assert "--graceful-timeout=60" in dict(unit)["ExecStart"]


def test_a_workers_stop_timeout_exceeds_its_task_time_limit(rendered):
    for host, name in (("usual", "mail"), ("usual", "maintenance"), ("other", "slow")):
        unit = dict(settings(rendered[host][f"mailroom-worker@{name}.service"]))
        (limit,) = [word for word in unit["ExecStart"].split() if word.startswith("--time-limit=")]
        assert int(unit["TimeoutStopSec"]) > int(limit.partition("=")[2])
        # Celery replaces %h with the host's name, so systemd must not replace it with a home directory.
        assert f"--hostname={name}@%%h" in unit["ExecStart"]
    slow = dict(settings(rendered["other"]["mailroom-worker@slow.service"]))
    assert slow["Type"] == "notify"
    assert "--queues=a,b --pool=solo" in slow["ExecStart"]


def test_a_process_gets_its_arguments_unchanged(rendered):
    unit = dict(settings(rendered["other"]["mailroom-say.service"]))
    assert unit["ExecStart"] == '/bin/echo "100%% of $$HOME" "a \\"b\\""'
    assert unit["MemoryMax"] == "64M"
    relay = dict(settings(rendered["usual"]["mailroom-relay.service"]))
    assert relay["ExecStart"] == "/opt/mailroom/current/venv/bin/python manage.py relay"


def test_no_unit_contains_a_secret(rendered):
    for files in rendered.values():
        for name, text in files.items():
            assert name in NO_UNITS or MARK not in text


def test_every_application_service_has_the_sandbox_and_no_start_limit(rendered):
    for files in rendered.values():
        for name, text in files.items():
            if name.startswith("mailroom-") and name.endswith(".service"):
                unit = sections(text)
                if name.endswith("-standby.service"):
                    unit["Service"] = [("Restart", "always") if each == ("Restart", "no") else each for each in unit["Service"]]
                assert [directive for directive in unit["Service"] if directive[0] not in PER_SERVICE] == HARDENING, name
                assert [directive for directive in unit["Unit"] if "StartLimit" in directive[0]] == [("StartLimitIntervalSec", "0")]
                assert dict(unit["Service"])["User"] in ("mailroom", "mailroom-flower", "tasks")


def test_the_packaged_broker_gets_the_sandbox_and_its_exceptions(rendered):
    unit = sections(rendered["other"]["rabbitmq-server.service"])
    assert set(unit) == {"Service"}
    sandbox = [directive for directive in HARDENING if directive[0] not in OWN_UNITS]
    assert unit["Service"] == [
        *sandbox,
        ("ReadWritePaths", "/var/lib/rabbitmq /var/log/rabbitmq"),
        ("NoExecPaths", "/tmp /var/tmp -/dev/shm /var/lib/rabbitmq /var/log/rabbitmq"),  # noqa: S108 - a directive of a unit
        ("IPAddressDeny", "any"),
        ("IPAddressAllow", "localhost 192.0.2.0/24"),
        ("LimitNOFILE", "100000"),
        ("MemoryMax", "2G"),
        ("ProcSubset", "all"),
        ("RestrictAddressFamilies", "AF_NETLINK"),
    ]
    without_programs = ("NoExecPaths", "/tmp /var/tmp -/dev/shm")  # noqa: S108 - a directive of a unit
    limit = [("IPAddressDeny", "any"), ("IPAddressAllow", "localhost 192.0.2.0/24")]
    assert sections(rendered["other"]["epmd.service"]) == {"Service": [*sandbox, without_programs, *limit]}


def test_packaged_units_accept_all_addresses_by_default(rendered):
    for name in ("rabbitmq-server.service", "epmd.service", "epmd.socket"):
        assert "IPAddress" not in rendered["usual"][name]


def test_systemd_analyze_accepts_the_units(rendered, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("There is no systemd-analyze on this machine.")
    for host, files in rendered.items():
        folder = tmp_path / host.replace(" ", "-")
        folder.mkdir()
        for name in files.keys() - NO_UNITS - {"rabbitmq-server.service", "epmd.socket", "epmd.service"}:
            # The programs are not installed on this machine.
            (folder / name).write_text(re.sub(r"^ExecStart=/(opt|srv)/\S+", "ExecStart=/bin/true", files[name], flags=re.MULTILINE))
        command = ["systemd-analyze", "verify", "--man=no", *sorted(folder.iterdir())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_alternative_values_reach_the_services(rendered):
    other = rendered["alternative"]
    unit = list(settings(other["mailroom-worker@mail.service"]))
    worker = dict(unit)
    assert (worker["User"], worker["WorkingDirectory"]) == ("tasks", "/srv/tasks")
    assert [value for name, value in unit if name == "EnvironmentFile"] == ["/srv/tasks.env", "/srv/worker.env"]
    assert '"--loglevel=DEBUG"' in worker["ExecStart"] or "--loglevel=DEBUG" in worker["ExecStart"].split()
    web = dict(settings(other["mailroom-web.service"]))["ExecStart"]
    assert "--workers=7" in web and "--threads=9" in web
    assert dict(settings(other["mailroom-flower.service"]))["MemoryMax"] == "99M"
    flower = other["flower.environment"].splitlines()
    assert {"FLOWER_URL_PREFIX='flower'", "FLOWER_READ_ONLY='true'", "FLOWER_MAX_TASKS='123'"} <= set(flower)
