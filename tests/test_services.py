"""Tests the filters for services: defaults in argument specs, Celery workers, Django processes, unit files and property lists."""

from __future__ import annotations

import plistlib

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.django_celery.stack.plugins.filter import application_services, argument_specs, launchd, systemd
from helpers import ROOT

# All directives in [Service] that are the same for every service. The order of SystemCallFilter lines matters.
HARDENING = [
    ("Restart", "always"),
    ("RestartSec", "2"),
    ("KillMode", "mixed"),
    ("OOMPolicy", "continue"),
    ("UMask", "0027"),
    ("NoNewPrivileges", "yes"),
    ("CapabilityBoundingSet", ""),
    ("ProtectSystem", "strict"),
    ("ProtectHome", "yes"),
    ("ProtectProc", "invisible"),
    ("ProcSubset", "pid"),
    ("ProtectClock", "yes"),
    ("ProtectControlGroups", "yes"),
    ("ProtectHostname", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("PrivateDevices", "yes"),
    ("PrivateIPC", "yes"),
    ("PrivateTmp", "yes"),
    ("PrivateUsers", "yes"),
    ("RemoveIPC", "yes"),
    ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
    ("RestrictNamespaces", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("LockPersonality", "yes"),
    ("MemoryDenyWriteExecute", "yes"),
    ("KeyringMode", "private"),
    ("SystemCallArchitectures", "native"),
    ("SystemCallFilter", "@system-service"),
    ("SystemCallFilter", "~@privileged @resources @keyring process_vm_readv process_vm_writev"),
    ("SystemCallFilter", "@chown"),
    ("SystemCallErrorNumber", "EPERM"),
]
PER_SERVICE = {
    "Type", "User", "Group", "WorkingDirectory", "EnvironmentFile", "Environment", "ExecStart", "TimeoutStartSec", "TimeoutStopSec",
    "WatchdogSec", "MemoryMax", "TasksMax", "CPUWeight", "LimitNOFILE", "StateDirectory", "StateDirectoryMode", "ReadWritePaths",
    "NoExecPaths", "NotifyAccess", "Sockets",
}  # fmt: skip


def sections(text):
    """The directives of a unit file as pairs, by section."""
    found = {}
    for line in text.splitlines():
        if line.startswith("["):
            directives = found[line.strip("[]")] = []
        elif line:
            directives.append(tuple(line.split("=", 1)))
    return found


# Defaults of argument specs

SPECS = {
    "argument_specs": {
        "main": {
            "options": {
                "broker_users": {
                    "type": "list",
                    "elements": "dict",
                    "options": {
                        "name": {"type": "str", "required": True},
                        "tags": {"type": "list", "elements": "str", "default": []},
                        "comment": {"type": "str"},
                        "rights": {
                            "type": "list",
                            "elements": "dict",
                            "default": [],
                            "options": {"vhost": {"type": "str", "default": "/"}, "read": {"type": "str"}},
                        },
                        "limit": {"type": "dict", "options": {"seconds": {"type": "int", "default": 300}}},
                    },
                },
                "broker_port": {"type": "int", "default": 5672},
            }
        }
    }
}


@pytest.fixture
def with_defaults(tmp_path, monkeypatch):
    (tmp_path / "broker/meta").mkdir(parents=True)
    (tmp_path / "broker/meta/argument_specs.yml").write_text(yaml.safe_dump(SPECS))
    monkeypatch.setattr(argument_specs, "ROLES", tmp_path)
    argument_specs._options.cache_clear()
    yield argument_specs.with_defaults
    argument_specs._options.cache_clear()


def test_entries_get_the_defaults_that_they_do_not_set(with_defaults):
    assert with_defaults([{"name": "a"}, {"name": "b", "tags": ["x"]}], "broker", "broker_users") == [
        {"name": "a", "tags": [], "rights": []},
        {"name": "b", "tags": ["x"], "rights": []},
    ]


def test_nested_entries_get_their_defaults(with_defaults):
    (user,) = with_defaults([{"name": "a", "rights": [{}, {"vhost": "v", "read": ".*"}], "limit": {}}], "broker", "broker_users")
    assert user["rights"] == [{"vhost": "/"}, {"vhost": "v", "read": ".*"}]
    assert user["limit"] == {"seconds": 300}


def test_false_and_unknown_values_are_kept(with_defaults):
    given = [{"name": "", "tags": None, "rights": None, "limit": {"seconds": 0}, "more": {"x": 1}}]
    assert with_defaults(given, "broker", "broker_users") == given


def test_values_without_nested_options_are_returned_unchanged(with_defaults):
    assert with_defaults(None, "broker", "broker_users") is None
    assert with_defaults(5672, "broker", "broker_port") == 5672


def test_defaults_are_copies_and_arguments_are_not_modified(with_defaults):
    given = [{"name": "a"}]
    (user,) = with_defaults(given, "broker", "broker_users")
    user["tags"].append("x")
    assert given == [{"name": "a"}]
    assert with_defaults(given, "broker", "broker_users")[0]["tags"] == []


@pytest.mark.parametrize(
    ("role", "variable", "words"), [("brokr", "broker_users", "brokr"), ("broker", "broker_user", "no option broker_user")]
)
def test_an_unknown_role_or_variable_is_an_error(with_defaults, role, variable, words):
    with pytest.raises(AnsibleFilterError, match=words):
        with_defaults([], role, variable)


def test_every_use_in_a_role_names_a_variable_with_nested_options():
    uses = [
        (file, line.split("with_defaults('")[1].split("'")[0:3:2])
        for file in sorted((ROOT / "roles").glob("*/*/**/*.yml"))
        for line in file.read_text().splitlines()
        if "with_defaults(" in line
    ]
    assert len(uses) >= 3
    for file, (role, variable) in uses:
        assert file.is_relative_to(ROOT / "roles" / role)
        assert argument_specs._options(role)[variable]["options"]


# Celery workers and Django processes


def workers(*entries):
    given = [{"name": "mail", "queues": ["a", "b"], **entry} for entry in entries]
    return argument_specs.with_defaults(given, "celery", "celery_workers")


def as_service(**worker):
    (service,) = application_services.celery_workers_as_services(workers(worker), "shop", "shop.celery", "/venv/bin/celery", "INFO")
    return service


def test_a_worker_with_defaults():
    assert as_service() == {
        "name": "shop-worker@mail",
        "description": "Celery worker mail of shop",
        "type": "exec",
        "command": [
            "/venv/bin/celery",
            "--app=shop.celery",
            "worker",
            "--hostname=mail@%h",
            "--queues=a,b",
            "--pool=prefork",
            "--concurrency=2",
            "--prefetch-multiplier=1",
            "--time-limit=300",
            "--max-tasks-per-child=2000",
            "--without-gossip",
            "--without-mingle",
            "--task-events",
            "--loglevel=INFO",
        ],
        "stop_timeout": 330,
    }


def test_a_worker_with_every_option():
    service = as_service(
        concurrency=8, pool="threads", time_limit=60, soft_time_limit=50, prefetch_multiplier=4, max_tasks_per_child=7,
        memory_max="1G", tasks_max=64, cpu_weight=50, readiness="notify", watchdog=9,
    )  # fmt: skip
    assert {name: service[name] for name in ("type", "stop_timeout", "memory_max", "tasks_max", "cpu_weight", "watchdog")} == {
        "type": "notify",
        "stop_timeout": 90,
        "memory_max": "1G",
        "tasks_max": 64,
        "cpu_weight": 50,
        "watchdog": 9,
    }
    assert service["command"][5:11] == [
        "--pool=threads",
        "--concurrency=8",
        "--prefetch-multiplier=4",
        "--time-limit=60",
        "--soft-time-limit=50",
        "--max-tasks-per-child=7",
    ]


def test_a_soft_limit_must_be_below_the_limit():
    too_high = [{"name": "equal", "soft_time_limit": 300}, {"name": "above", "time_limit": 60, "soft_time_limit": 61}]
    right = [{"name": "below", "soft_time_limit": 299}, {"name": "none"}]
    assert application_services.celery_workers_soft_limit_too_high(workers(*right, *too_high)) == ["equal", "above"]


@pytest.mark.parametrize(
    ("limits", "valid"),
    [
        ({}, True),
        ({"memory_max": "512M", "tasks_max": 1, "cpu_weight": 10000}, True),
        ({"memory_max": "100%", "cpu_weight": 1}, True),
        ({"memory_max": "0"}, False),
        ({"memory_max": "101%"}, False),
        ({"memory_max": "1 G"}, False),
        ({"memory_max": "infinity"}, False),
        ({"tasks_max": 0}, False),
        ({"cpu_weight": 0}, False),
        ({"cpu_weight": 10001}, False),
    ],
)
def test_limits_that_systemd_would_ignore_are_found(limits, valid):
    assert application_services.services_with_wrong_limits([{"name": "a", **limits}]) == ([] if valid else ["a"])


def test_processes_use_the_programs_of_the_virtual_environment():
    given = [
        {"name": "relay", "command": ["python", "manage.py", "relay"], "readiness": "notify", "watchdog": 60},
        {"name": "say", "command": ["/bin/echo"], "stop_timeout": 5, "memory_max": "64M"},
    ]
    processes = argument_specs.with_defaults(given, "django", "django_processes")
    relay, say = application_services.django_processes_as_services(processes, "shop", "/venv/bin")
    assert (relay["name"], relay["description"], relay["type"]) == ("shop-relay", "relay of shop", "notify")
    assert (relay["command"], relay["stop_timeout"], relay["watchdog"]) == (["/venv/bin/python", "manage.py", "relay"], 30, 60)
    assert (say["type"], say["command"], say["stop_timeout"], say["memory_max"]) == ("exec", ["/bin/echo"], 5, "64M")


# Unit files


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain-word_1.2:/a,b=c@d+e", "plain-word_1.2:/a,b=c@d+e"),
        ("", '""'),
        ("two words", '"two words"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("single'quote", '"single\'quote"'),
        ("100%", "100%%"),
        ("a;b", '"a;b"'),
        ("line\nbreak\t", '"line\\nbreak\\t"'),
        (8000, "8000"),
    ],
)
def test_words_are_quoted_for_systemd(value, text):
    assert systemd.quote(value) == text


def test_variables_in_command_lines_are_escaped():
    command = ["/bin/echo", "$HOME", "${x} y", "%h", "mail@%h"]
    assert systemd.command_line(command) == '/bin/echo $$HOME "$${x} y" %%h mail@%%h'


def services(*entries):
    given = [{"name": "web", "description": "Web", "directory": "/opt/shop", "command": ["/bin/web"], **entry} for entry in entries]
    return argument_specs.with_defaults(given, "services", "services_list")


def units(*entries, app="shop", user="shopper", after=("db.service",)):
    return systemd.systemd_units(services(*entries), app, user, after)


def service_unit(**service):
    """The directives of a service's unit, by section."""
    return sections(units(service)[-1]["content"])


def test_a_schedule_becomes_a_timer_and_a_service_that_only_the_timer_starts():
    _, service, timer = units({"schedule": "Mon 04:30", "run_timeout": 60})
    assert (service["name"], service["on_demand"], timer["name"]) == ("web.service", True, "web.timer")
    found = sections(service["content"])
    assert {("Type", "oneshot"), ("Restart", "no"), ("TimeoutStartSec", "60")} <= set(found["Service"])
    assert "Install" not in found
    assert [directive for directive in found["Service"] if directive[0] not in PER_SERVICE] == [
        ("Restart", "no") if directive[0] == "Restart" else directive for directive in HARDENING
    ]
    assert sections(timer["content"]) == {
        "Unit": [("Description", "Schedule of Web"), ("PartOf", "shop.target")],
        "Timer": [("OnCalendar", "Mon 04:30"), ("Persistent", "yes")],
        "Install": [("WantedBy", "shop.target")],
    }


def test_schedule_of_a_package_belongs_to_no_application():
    service, timer = units({"schedule": "Mon 04:30"}, app="")
    assert "PartOf" not in dict(sections(service["content"])["Unit"])
    assert "PartOf" not in dict(sections(timer["content"])["Unit"])
    assert sections(timer["content"])["Install"] == [("WantedBy", "timers.target")]


@pytest.mark.parametrize("directive", HARDENING, ids="=".join)
def test_every_service_has_each_directive_of_the_sandbox(directive):
    assert directive in service_unit()["Service"]


def test_a_service_has_no_other_directives_by_default():
    found = service_unit(listen=["8000"], watchdog=1, memory_max="1G", state_directory="a", writable=["/b"], environment={"A": 1})
    assert [directive for directive in found["Service"] if directive[0] not in PER_SERVICE] == HARDENING
    assert ("StartLimitIntervalSec", "0") in found["Unit"]
    assert {name for name, _ in found["Unit"]} == {
        "Description", "PartOf", "After", "Wants", "Requires", "StartLimitIntervalSec",
    }  # fmt: skip


def test_a_service_with_defaults():
    found = service_unit()
    assert [directive for directive in found["Service"] if directive[0] in PER_SERVICE] == [
        ("Type", "exec"),
        ("User", "shopper"),
        ("Group", "shopper"),
        ("WorkingDirectory", "/opt/shop"),
        ("ExecStart", "/bin/web"),
        ("TimeoutStopSec", "30"),
        ("MemoryMax", "80%"),
        ("TasksMax", "1024"),
        ("CPUWeight", "100"),
        ("LimitNOFILE", "65536"),
        ("NoExecPaths", "/tmp /var/tmp -/dev/shm"),  # noqa: S108 - a directive of a unit
    ]
    assert found["Unit"] == [
        ("Description", "Web"),
        ("PartOf", "shop.target"),
        ("After", "network-online.target db.service"),
        ("Wants", "network-online.target"),
        ("StartLimitIntervalSec", "0"),
    ]
    assert found["Install"] == [("WantedBy", "shop.target")]


def test_a_service_with_every_option():
    found = service_unit(
        type="notify", environment_files=["/etc/shop", "/etc/shop.own"], environment={"A": "100% x", "B": 1},
        stop_timeout=5, watchdog=9, memory_max="1G", tasks_max=64, cpu_weight=50, open_files=10, state_directory="shop",
        writable=["/a", "/b"], directives=["PrivateUsers=no"],
    )  # fmt: skip
    assert [directive for directive in found["Service"] if directive[0] in PER_SERVICE] == [
        ("Type", "notify"),
        ("User", "shopper"),
        ("Group", "shopper"),
        ("WorkingDirectory", "/opt/shop"),
        ("EnvironmentFile", "/etc/shop"),
        ("EnvironmentFile", "/etc/shop.own"),
        ("Environment", '"A=100%% x"'),
        ("Environment", "B=1"),
        ("ExecStart", "/bin/web"),
        ("TimeoutStopSec", "5"),
        ("WatchdogSec", "9"),
        ("MemoryMax", "1G"),
        ("TasksMax", "64"),
        ("CPUWeight", "50"),
        ("LimitNOFILE", "10"),
        ("StateDirectory", "shop"),
        ("StateDirectoryMode", "0750"),
        ("ReadWritePaths", "/a /b"),
        ("NoExecPaths", "/tmp /var/tmp -/dev/shm /var/lib/shop /a /b"),  # noqa: S108 - a directive of a unit
    ]
    # The last of two directives applies, so a service can override the sandbox.
    assert found["Service"][-1] == ("PrivateUsers", "no")


def test_addresses_limit_a_service_and_its_socket():
    limit = [("IPAddressDeny", "any"), ("IPAddressAllow", "localhost 192.0.2.1 2001:db8::/32")]
    addresses = {"allowed_addresses": ["192.0.2.1", "2001:db8::/32"]}
    assert [each for each in service_unit(**addresses)["Service"] if each[0].startswith("IPAddress")] == limit
    packaged = {"packaged": True, **addresses}
    service, socket = units({**packaged, "sandbox": True}, {**packaged, "listen": ["4369"]}, app="")
    assert [each for each in sections(service["content"])["Service"] if each[0].startswith("IPAddress")] == limit
    assert sections(socket["content"])["Socket"][-2:] == limit
    own_socket = units({"listen": ["8000"], **addresses})[1]
    assert sections(own_socket["content"])["Socket"][-2:] == limit


def test_an_application_has_a_target_and_its_services_are_restarted_for_their_files():
    target, web, relay = units({"restart_on": ["/a"]}, {"name": "relay"})
    assert (target["name"], target["shared"]) == ("shop.target", True)
    assert sections(target["content"]) == {
        "Unit": [("Description", "All services of shop")],
        "Install": [("WantedBy", "multi-user.target")],
    }
    assert {name: value for name, value in web.items() if name != "content"} == {
        "name": "web.service",
        "restart_on": ["/a"],
        "settle": 3,
    }
    assert (relay["name"], relay["restart_on"]) == ("relay.service", [])


def test_a_socket_precedes_its_service_which_requires_it():
    _, socket, web = units({"listen": ["127.0.0.1:8000", "/run/x.sock"]})
    assert socket["name"] == "web.socket"
    assert sections(socket["content"]) == {
        "Unit": [("Description", "Socket of Web"), ("PartOf", "shop.target")],
        "Socket": [
            ("ListenStream", "127.0.0.1:8000"),
            ("ListenStream", "/run/x.sock"),
            ("BindIPv6Only", "ipv6-only"),
            ("Backlog", "2048"),
        ],
        "Install": [("WantedBy", "shop.target")],
    }
    unit = sections(web["content"])["Unit"]
    assert {("Requires", "web.socket"), ("After", "web.socket")} <= set(unit)


def test_a_standby_differs_from_its_service_in_socket_restart_and_installation():
    _, _, web, standby = units({"listen": ["8000"], "handover": True, "restart_on": ["/a"]})
    assert {name: value for name, value in standby.items() if name != "content"} == {
        "name": "web-standby.service",
        "standby_of": "web.service",
    }
    own, other = sections(web["content"]), sections(standby["content"])
    assert other["Unit"] == [("Description", "Web, during a restart"), *own["Unit"][1:]]
    assert set(other["Service"]) ^ set(own["Service"]) == {("Sockets", "web.socket"), ("Restart", "always"), ("Restart", "no")}
    # Without a section [Install], systemd does not start the standby at boot.
    assert "Install" not in other


def test_packaged_units_are_drop_ins_without_a_target():
    broker, mapper = units(
        {"name": "broker", "packaged": True, "directives": ["LimitNOFILE=5"], "restart_on": ["/a"], "reload_on": ["/b"]},
        {"name": "epmd", "packaged": True, "listen": ["4369"]},
        app="",
    )
    files = {"restart_on": ["/a"], "reload_on": ["/b"]}
    assert broker == {"name": "broker.service", "content": "[Service]\nLimitNOFILE=5\n", "packaged": True, **files}
    assert (mapper["name"], mapper["packaged"]) == ("epmd.socket", True)
    # The empty value removes the package's addresses.
    assert mapper["content"].splitlines()[-2:] == ["ListenStream=", "ListenStream=4369"]


# Property lists


def jobs(*entries, user=""):
    return launchd.launchd_jobs(services(*entries), "shop/django", user, "/Logs/shop/django")


def test_a_job_with_defaults():
    job, _ = jobs({"restart_on": ["/a"]})
    assert plistlib.loads(job.pop("content").encode()) == {
        "Label": "web",
        "LimitLoadToSessionType": ["Aqua", "Background"],
        "ProgramArguments": ["/bin/sh", "-c", launchd.START, "/Logs/shop/django/web.pid", "--", "/bin/web"],
        "WorkingDirectory": "/opt/shop",
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 5,
        "ExitTimeOut": 30,
        "AbandonProcessGroup": False,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 65536},
        "HardResourceLimits": {"NumberOfFiles": 65536},
        "Umask": 0o027,
        "StandardOutPath": "/Logs/shop/django/web.log",
        "StandardErrorPath": "/Logs/shop/django/web.log",
    }
    assert job == {"name": "web", "pid_file": "/Logs/shop/django/web.pid", "restart_on": ["/a"], "settle": 3}


def test_a_job_with_every_option():
    service = {
        "command": ["/bin/web", "<&>", 5], "environment": {"A": 1, "B": "it's"}, "environment_files": ["/etc/shop", "/etc/own"],
        "stop_timeout": 5, "open_files": 10,
    }  # fmt: skip
    plist = plistlib.loads(jobs(service, user="shopper")[0]["content"].encode())
    assert plist["UserName"] == "shopper"
    assert "LimitLoadToSessionType" not in plist
    assert plist["ProgramArguments"][4:] == ["/etc/shop", "/etc/own", "--", "/bin/web", "<&>", "5"]
    assert plist["EnvironmentVariables"] == {"A": "1", "B": "it's"}
    assert (plist["ExitTimeOut"], plist["SoftResourceLimits"], plist["HardResourceLimits"]) == (
        5,
        {"NumberOfFiles": 10},
        {"NumberOfFiles": 10},
    )


def test_one_job_rotates_the_logs_of_an_owners_jobs():
    *_, logs = jobs({"name": "web"}, {"name": "relay"}, user="shopper")
    plist = plistlib.loads(logs["content"].encode())
    assert (logs["name"], logs["restart_on"], plist["UserName"]) == ("shop-django-logs", [], "shopper")
    assert plist["ProgramArguments"] == ["/usr/sbin/newsyslog", "-r", "-f", "/Logs/shop/django/newsyslog.conf"]
    assert plist["StartInterval"] == 3600
    assert not {"KeepAlive", "RunAtLoad", "EnvironmentVariables"} & set(plist)


def test_without_services_no_job_rotates_logs():
    assert jobs() == []
