"""Tests the problems that playbooks/preflight.yml finds on a host, its tests per layer, and its report."""

from __future__ import annotations

import http.server
import json
import os
import re
import smtplib
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from ansible.errors import AnsibleFilterError
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.filter import preflight as filters
from ansible_collections.django_celery.stack.plugins.module_utils import preflight
from ansible_collections.django_celery.stack.plugins.modules import preflight as module
from helpers import executable, wiring


def only(found):
    """Returns the only problem."""
    (problem,) = found
    return problem


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port(listener):
    """A port of 127.0.0.1 without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Replaces programs of the host; returns a function that writes one."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(preflight, "APT_HELPER", str(tmp_path / "bin/apt-helper"))
    return lambda name, text: executable(tmp_path / "bin" / name, text)


# The host


def test_missing_disk_space_is_found_for_a_directory_that_does_not_exist_yet(tmp_path):
    assert list(preflight.disk_problems({"/": 0, str(tmp_path / "a/b"): 0})) == []
    problem = only(preflight.disk_problems({"/": 0, str(tmp_path / "a/b"): 1e9}))
    assert problem.startswith(f"{tmp_path}/a/b has ") and "GB of free space; 1e+09 GB are needed. Free space" in problem


def test_small_memory_is_found(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:        2048000 kB\nMemFree: 1 kB\n")
    assert list(preflight.memory_problems(2000, str(tmp_path / "meminfo"))) == []
    problem = only(preflight.memory_problems(2001, str(tmp_path / "meminfo")))
    assert problem == "The host has 2000 MB of memory; 2001 MB are needed. Use a larger host."


@pytest.mark.parametrize("offset", [-60, 60])
def test_wrong_clock_is_found_in_both_directions(offset):
    assert list(preflight.clock_problems(time.time(), 30)) == []
    problem = only(preflight.clock_problems(time.time() + offset, 30))
    assert re.match(rf"The clock differs from the controller's by {-offset}\.\d s; ", problem)
    assert "allowed: 30 s. Synchronize both with NTP" in problem


def test_name_that_does_not_resolve_is_found():
    problem = only(preflight.name_problems(["localhost", "192.0.2.7", "nowhere.invalid"]))
    assert problem.startswith("nowhere.invalid does not resolve (")


def test_url_without_a_response_is_found(closed_port):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # The server answers 501, which is a response too.
        good, bad = f"http://127.0.0.1:{server.server_port}/", f"http://127.0.0.1:{closed_port}/"
        problem = only(preflight.url_problems([good, bad]))
        server.shutdown()
    assert problem.startswith(f"{bad} does not answer (") and "Connection refused" in problem
    assert only(preflight.url_problems(["no-url"])).startswith("no-url does not answer (")


def test_url_with_a_response_is_accepted(tmp_path):
    (tmp_path / "page").touch()
    assert list(preflight.url_problems([f"file://{tmp_path}/page", f"file://{tmp_path}"])) == []
    assert only(preflight.url_problems([f"file://{tmp_path}/nothing"])).startswith(f"file://{tmp_path}/nothing does not answer (")


# Package sources


def test_apt_source_without_a_response_is_found(programs):
    urls = "http://good/dists/a/InRelease http://bad/dists/a/InRelease http://bad/dists/a/InRelease"
    programs("apt-get", f"import sys; assert sys.argv[1] == 'indextargets'; print({urls!r}.replace(' ', chr(10)))")
    programs(
        "apt-helper", "import sys; bad = 'bad' in sys.argv[2]; print('E: No route', file=sys.stderr) if bad else 0; sys.exit(bad)"
    )
    problem = only(preflight.package_source_problems())
    assert problem == (
        "apt can't read http://bad/dists/a/InRelease (E: No route). Correct /etc/apt/sources.list.d, or allow the connection."
    )


@pytest.mark.parametrize(("code", "reason"), [(0, None), (1, "code 1")])
def test_dnf_repository_without_a_response_is_found(programs, code, reason):
    programs(
        "dnf",
        f"import sys; assert sys.argv[2] == '--assumeyes' and sys.argv[3].startswith('--setopt=cachedir=/'); sys.exit({code})",
    )
    found = list(preflight.package_source_problems())
    assert found == (
        [f"dnf can't read its repositories ({reason}). Correct /etc/yum.repos.d, or allow the connection."] if reason else []
    )


def test_host_without_a_known_package_manager_has_no_problem(programs):
    assert list(preflight.package_source_problems()) == []


# Mail server


@pytest.fixture
def mail_server():
    """Starts a mail server that answers each line with the given replies; returns its port."""
    servers = []

    def start(*replies):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve():
            connection, _ = server.accept()
            with connection, connection.makefile("rwb") as stream:
                for reply in replies:
                    stream.write(reply.encode() + b"\r\n")
                    stream.flush()
                    stream.readline()

        threading.Thread(target=serve, daemon=True).start()
        return server.getsockname()[1]

    yield start
    for server in servers:
        server.close()


def test_mail_server_that_answers_has_no_problem(mail_server):
    assert list(preflight.mail_problems(None)) == []
    port = mail_server("220 ready", "250 hello", "221 bye")
    assert list(preflight.mail_problems({"host": "127.0.0.1", "port": port, "tls": False})) == []


@pytest.mark.parametrize(
    ("replies", "reason"), [(("220 ready", "502 no", "221 bye"), "EHLO returns 502"), (("554 no",), "(554, b'no')")]
)
def test_mail_server_that_refuses_is_found(mail_server, replies, reason):
    port = mail_server(*replies)
    problem = only(preflight.mail_problems({"host": "127.0.0.1", "port": port, "tls": False}))
    assert (
        problem == f"The mail server 127.0.0.1:{port} does not answer ({reason}). Correct app_email_url, or allow the connection."
    )


@pytest.mark.parametrize("tls", [False, True])
def test_absent_mail_server_is_found(closed_port, tls):
    assert "Connection refused" in only(preflight.mail_problems({"host": "127.0.0.1", "port": closed_port, "tls": tls}))


def test_connection_with_tls_uses_tls(mail_server, monkeypatch):
    monkeypatch.setattr(smtplib, "SMTP_SSL", lambda *_, **__: pytest.fail("used"))
    with pytest.raises(pytest.fail.Exception):
        list(preflight.mail_problems({"host": "127.0.0.1", "port": 1, "tls": True}))


# Ports


def test_port_that_another_process_uses_is_found(listener, closed_port, monkeypatch):
    # If systemd runs on the machine, the name of the test's unit is not known.
    monkeypatch.setattr(preflight, "unit_of", lambda process: "mine.service" if process == os.getpid() else "other")
    monkeypatch.setattr(preflight, "socket_units", lambda _port: [])
    assert list(preflight.port_problems({str(listener): r"mine\.service", str(closed_port): "nobody"})) == []
    assert len(list(preflight.port_problems({str(listener): "mine"}))) == 1
    problem = only(preflight.port_problems({str(listener): "yours.*"}))
    assert problem == f"Port {listener} is used by mine.service. Stop it, or choose another port for one of them."


def test_port_that_another_socket_unit_uses_is_found(listener, monkeypatch):
    monkeypatch.setattr(preflight, "processes_with", lambda _inodes: [1])
    monkeypatch.setattr(preflight, "socket_units", lambda _port: ["shop-web.socket"])
    assert "is used by shop-web.socket." in only(preflight.port_problems({str(listener): r"mailroom-web\.socket"}))
    assert list(preflight.port_problems({str(listener): r"shop-web\.socket"})) == []


def test_socket_units_of_a_port_are_found(programs):
    lines = "127.0.0.1:8000 mailroom-web.socket mailroom-web.service\n[::]:18000 b.socket b.service\n/run/c c.socket c.service\n"
    programs("systemctl", f"print({lines!r})".replace("\\n'", "'"))
    assert preflight.socket_units(8000) == ["mailroom-web.socket"]


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("0::/system.slice/rabbitmq-server.service\n", "rabbitmq-server.service"),
        ("1:name=systemd:/\n0::/system.slice/system-w.slice/w@mail.service/worker\n", "w@mail.service"),
        ("0::/user.slice/session-1.scope\n", "python3"),
    ],
)
def test_unit_of_a_process(tmp_path, cgroup, name):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_text(cgroup)
    (tmp_path / "7/comm").write_text("python3\n")
    assert preflight.unit_of(7, str(tmp_path)) == name
    assert preflight.unit_of(8, str(tmp_path)) == "an unknown process"


def test_process_that_ends_is_ignored(tmp_path):
    for process in ("7", "8", "self"):
        (tmp_path / process).mkdir()
    (tmp_path / "8/fd").mkdir()
    (tmp_path / "8/fd/3").symlink_to("socket:[42]")
    assert list(preflight.processes_with({"42"}, str(tmp_path))) == [8]


def test_listening_sockets_of_a_port_are_found(tmp_path):
    row = "   0: 0100007F:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1 0 100 0 0 10 0\n"
    rows = [(5672, "0A", 1), (5672, "01", 2), (5673, "0A", 3)]
    (tmp_path / "tcp").write_text(
        "header\n" + "".join(row.format(port=port, state=state, inode=inode) for port, state, inode in rows)
    )
    assert preflight.listening_sockets(5672, str(tmp_path)) == {"1"}


# The module


def test_module_reports_problems_and_warnings(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "package_source_problems", lambda: iter([]))
    options = {"disk": {"/": 1e9}, "memory": 10**9, "controller_time": 0, "clock": 1, "names": ["nowhere.invalid"]}
    with patch_module_args(options), pytest.raises(SystemExit):
        module.main()
    result = json.loads(capsys.readouterr().out)
    assert not result["changed"]
    assert [line.split()[0] for line in result["problems"]] == ["/", "The", "nowhere.invalid"]
    assert "MB of memory" in only(result["warned"])


# The filters


def options(groups, platform="debian13", quick=False, **variables):
    everything = {
        "group_names": groups,
        "host_platform": platform,
        "wiring_versions": wiring()["wiring_versions"],
        "app_name": "mailroom",
        "rabbitmq_listeners": ["127.0.0.1:5672"],
        **variables,
    }
    return filters.preflight_options(SimpleNamespace(resolve=everything.__getitem__), everything.keys(), quick)


def test_ports_of_each_layer_have_the_defaults_of_the_roles():
    found = options(["broker", "database", "app", "web", "workers", "flower"])["ports"]
    assert list(found) == ["5672", "15672", "15692", "4369", "25672", "5432", "8000", "5555"]
    assert found["8000"] == r"mailroom-web(-standby)?\.(service|socket)"
    assert options(["workers"])["ports"] == {}


def test_ports_follow_the_variables():
    found = options(["web", "flower"], django_web_listen=["0.0.0.0:8001", "/run/web.sock", "[::1]:8002"], flower_port=5556)
    assert list(found["ports"]) == ["8001", "8002", "5556"]


def test_default_package_index_is_the_one_that_pip_uses(monkeypatch):
    debug = subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, text=True, check=True).stdout
    address = filters.default_package_index()
    assert re.fullmatch(r"https://[^/\s]+/simple/", address) and urlsplit(address).hostname in debug
    filters.default_package_index.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: subprocess.CompletedProcess(words, 0, "no such option", ""))
    with pytest.raises(AnsibleFilterError, match="Set host_package_index_url"):
        filters.default_package_index()


@pytest.mark.parametrize(
    ("unit", "port"),
    [
        ("rabbitmq-server.service", "5672"),
        ("epmd.socket", "4369"),
        ("postgresql@17-main.service", "5432"),
        ("postgresql.service", "5432"),
        ("mailroom-web.socket", "8000"),
        ("nginx.service", "80"),
        ("mailroom-web-standby.service", "8000"),
        ("nginx.service", "443"),
    ],
)
def test_units_of_the_bundle_may_use_their_ports(unit, port):
    assert re.fullmatch(options(["broker", "database", "web", "proxy"])["ports"][port], unit)


@pytest.mark.parametrize(
    ("groups", "platform", "variables", "urls"),
    [
        (["database"], "debian13", {}, []),
        (["app"], "debian13", {}, [filters.default_package_index()]),
        (["flower"], "debian13", {"host_package_index_url": "https://mirror.example/"}, ["https://mirror.example/"]),
        (["broker"], "debian13", {}, []),
        (["proxy"], "debian13", {}, []),
        (["proxy"], "debian13", {"nginx_acme_directory_url": "https://acme.example/dir"}, ["https://acme.example/dir"]),
        (
            ["broker"],
            "ubuntu2404",
            {"erlang_source": "distribution"},
            ["https://deb1.rabbitmq.com/rabbitmq-server", "https://deb2.rabbitmq.com/rabbitmq-server"],
        ),
        (
            ["broker"],
            "el9",
            {"erlang_repository_urls": ["https://a.example/e"], "rabbitmq_repository_urls": ["https://a.example/r"]},
            ["https://a.example/e", "https://a.example/r"],
        ),
    ],
)
def test_urls_follow_the_sources(groups, platform, variables, urls):
    assert options(groups, platform, **variables)["urls"] == urls


def test_host_with_an_archive_of_packages_needs_no_package_source(monkeypatch):
    index = "file:///var/lib/offline-packages/current/index"
    for archive in ("", "packages.tar"):
        found = options(["app"], offline_packages_archive=archive, host_package_index_url=index)
        assert (found["package_sources"], found["urls"]) == ((False, []) if archive else (True, [index]))
    monkeypatch.setattr(preflight, "package_source_problems", lambda: ["apt can't read it."])
    given = {"disk": {}, "controller_time": time.time(), "clock": 60, "names": [], "ports": {}, "urls": [], "mail_server": None}
    assert preflight.problems({**given, "package_sources": False}) == []
    assert preflight.problems({**given, "package_sources": True}) == ["apt can't read it."]


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("smtp://a", {"host": "a", "port": 25, "tls": False}),
        ("smtp+tls://me:word@a", {"host": "a", "port": 587, "tls": False}),
        ("smtp+ssl://a:4650", {"host": "a", "port": 4650, "tls": True}),
        ("consolemail://", None),
    ],
)
def test_mail_server_of_a_url(url, server):
    assert options(["workers"], app_email_url=url).get("mail_server") == server
    assert "mail_server" not in options(["web"], app_email_url=url)


def facts(distribution, version, family="Debian"):
    major = version.split(".")[0]
    return {"distribution": distribution, "distribution_version": version, "distribution_major_version": major, "os_family": family}


@pytest.mark.parametrize(
    ("host", "platform"),
    [
        (facts("Debian", "13.2"), "debian13"),
        (facts("Debian", "forky/sid"), "debian13"),
        (facts("Ubuntu", "24.04"), "ubuntu2404"),
        (facts("Rocky", "9.5", "RedHat"), "el9"),
        (facts("MacOSX", "15.1", "Darwin"), "macos"),
    ],
)
def test_platform_of_the_inventory_is_accepted(host, platform):
    assert filters.platform_problems(host, platform) == []


def test_wrong_and_unsupported_platforms_are_found():
    problem = only(filters.platform_problems(facts("Rocky", "9.5", "RedHat"), "debian13"))
    assert problem == "The host has Rocky 9, and host_platform is debian13. Set host_platform to el9."
    assert only(filters.platform_problems(facts("Debian", "12.9"), "debian13")).startswith("Debian 12.9 is not supported")


@pytest.mark.parametrize(
    ("result", "step", "begin"),
    [
        (
            {"unreachable": True, "msg": "Task failed: no\n route."},
            "connect",
            "Ansible can't connect: no route. Correct the address",
        ),
        ({"msg": "not found"}, "connect", "Python 3.9 or newer does not run: not found. Install it"),
        (
            {"msg": "a", "module_stderr": "sudo: a password is required\n"},
            "become",
            "sudo fails: a sudo: a password is required. Permit",
        ),
        ({"msg": "a"}, "inspect", "The inspection fails: a."),
    ],
)
def test_failed_step_becomes_a_problem(result, step, begin):
    assert filters.failure_problem(result, step).startswith(begin)


def test_result_of_gather_facts_is_that_of_its_module():
    result = {"msg": "The following modules failed to execute: setup.", "failed_modules": {"setup": {"msg": "no sudo"}}}
    assert filters.failure_problem(result, "become").startswith("sudo fails: no sudo. Permit")


def test_quick_inspection_connects_to_no_other_host():
    variables = {"app_email_url": "smtp://a"}
    assert set(options(["app", "workers"], **variables)) == {"ports", "package_sources", "urls", "mail_server"}
    assert options(["app", "workers"], **variables, quick=True) == {"ports": {}, "package_sources": False, "urls": []}
    assert "8000" in options(["web"], quick=True)["ports"]


def test_report_names_the_host_of_each_problem():
    good = {"ansible_facts": facts("Debian", "13.2"), "host_platform": "debian13", "preflight_facts": {}}
    hosts = {"a": good, "b": {**good, "preflight_host": {"problems": [], "warned": []}}}
    assert filters.preflight_problems(hosts, hosts) == "" and filters.preflight_warnings(hosts, hosts) == ""
    hosts = {
        "a": good,
        "b": {**good, "host_platform": "ubuntu2404", "preflight_host": {"problems": ["Two.", "Three."], "warned": ["Small."]}},
        "c": {**good, "ansible_facts": {}, "preflight_facts": {"unreachable": True, "msg": "no route"}},
        "d": {**good, "ansible_facts": {}, "preflight_failure": {"msg": "a"}, "preflight_step": "become"},
    }
    assert filters.preflight_warnings(hosts, hosts) == "1 warning:\n  b: Small."
    lines = filters.preflight_problems(hosts, hosts).splitlines()
    assert [line.split()[0] for line in lines] == ["5", "b:", "b:", "b:", "c:", "d:"]
    assert lines[1:4] == [
        "  b: The host has Debian 13, and host_platform is ubuntu2404. Set host_platform to debian13.",
        "  b: Two.",
        "  b: Three.",
    ]
    assert lines[4].startswith("  c: Ansible can't connect: no route.") and lines[5].startswith("  d: sudo fails: a.")
    assert set(filters.FilterModule().filters()) == {"preflight_options", "preflight_problems", "preflight_warnings"}


def test_commands_print_english_messages(programs):
    programs("show", "import os; print(os.environ['LC_ALL'])")
    assert preflight.run("show").stdout == "C\n"
