"""Tests the status of an environment: what a host reports, the findings, the table, the page and the exit code."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.filter import status as filters
from ansible_collections.django_celery.stack.plugins.module_utils import host_status
from ansible_collections.django_celery.stack.plugins.modules import host_status as module
from ansible_collections.django_celery.stack.plugins.plugin_utils import status_page, status_report
from helpers import ROOT, executable, load

# ---- The host ----


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Replaces programs of the host; returns a function that writes one."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda name, text: executable(tmp_path / "bin" / name, text)


def test_system_has_name_memory_and_clock(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=debian\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n')
    (tmp_path / "proc/meminfo").write_text("MemTotal:  2000 kB\nMemFree: 1 kB\nMemAvailable: 500 kB\n")
    found = host_status.system(time.time() - 100, str(tmp_path))
    assert found["name"] == "Debian GNU/Linux 13 (trixie)"
    assert found["memory"] == {"total": 2048000, "available": 512000}
    assert 99 < found["seconds_off"] < 110


def test_python_names_a_system_without_the_files_of_linux(tmp_path):
    found = host_status.system(time.time(), str(tmp_path))
    assert found["name"] and found["memory"]["total"] == 0


def test_each_file_system_is_reported_once(tmp_path):
    (tmp_path / "a").mkdir()
    (disk,) = host_status.disks([str(tmp_path), str(tmp_path / "a"), str(tmp_path / "missing")])
    assert disk["path"] == str(tmp_path) and 0 < disk["free"] <= disk["total"]


SYSTEMCTL = """
import sys
if sys.argv[1] == "list-units":
    pattern = sys.argv[-1]
    names = {"shop-*": ["shop-cron.service"], "postgresql*.service": ["postgresql@17-main.service"]}.get(pattern, [])
    assert ("--state=failed" in sys.argv) == (pattern == "shop-*")
    print("".join(f"{name} loaded failed failed Text\\n" for name in names))
else:
    assert sys.argv[1] == "show"
    states = {"shop-cron.service": "failed", "gone.service": "inactive"}
    for name in sys.argv[3:]:
        if "*" in name: continue
        loaded = "not-found" if name == "gone.service" else "loaded"
        print(f"Id={name}\\nLoadState={loaded}\\nActiveState={states.get(name, 'active')}\\nSubState=running\\nNRestarts=2")
        print(f"MemoryCurrent={'18446744073709551615' if name == 'gone.service' else 4096}\\nStateChangeTimestampMonotonic=0\\n")
"""


def test_units_are_the_named_ones_and_failed_ones_of_the_application(programs):
    programs("systemctl", SYSTEMCTL)
    found = host_status.units(["shop-web.service", "postgresql*.service", "gone.service", "nothing*.service"], "shop")
    assert [(unit["name"], unit["state"], unit["installed"], unit["memory"]) for unit in found] == [
        ("shop-web.service", "active", True, 4096),
        ("postgresql@17-main.service", "active", True, 4096),
        ("gone.service", "inactive", False, None),
        ("nothing*.service", "inactive", False, None),
        ("shop-cron.service", "failed", True, 4096),
    ]
    assert found[0]["restarts"] == 2 and found[0]["seconds"] > 0


def test_host_without_systemd_or_units_has_no_units(programs):
    assert host_status.units(["shop-web.service"], "shop") == []
    programs("systemctl", "import sys; assert sys.argv[1] == 'list-units'")
    assert host_status.units([], "shop") == []


def test_versions_of_the_release(tmp_path):
    packages = tmp_path / "opt/shop/releases/abc/venv/lib/python3.13/site-packages"
    for name in ("celery-5.7.0.dist-info", "Django-5.2.19.dist-info", "six-1.dist-info"):
        (packages / name).mkdir(parents=True)
    assert host_status.application_versions("shop", str(tmp_path)) == {}
    (tmp_path / "opt/shop/current").symlink_to("releases/abc")
    found = host_status.application_versions("shop", str(tmp_path))
    assert found == {"release": "abc", "Python": "3.13", "Celery": "5.7.0", "Django": "5.2.19"}


def test_versions_of_nginx_and_postgresql(programs):
    assert host_status.program_versions() == {}
    programs("nginx", "import sys; print('nginx version: nginx/1.26.3 (Debian)', file=sys.stderr)")
    programs("psql", "print('psql (PostgreSQL) 17.12 (Debian 17.12-1)')")
    assert host_status.program_versions() == {"nginx": "1.26.3", "PostgreSQL": "17.12"}
    programs("psql", "print('unknown')")
    assert host_status.program_versions() == {"nginx": "1.26.3"}


def test_remaining_days_of_certificates_in_configurations_are_reported(tmp_path, programs):
    for path, text in {
        "etc/nginx/nginx.conf": "  ssl_certificate /etc/a.pem;\n  ssl_certificate_key /etc/a.key;\n  # ssl_certificate /no.pem;\n",
        "etc/rabbitmq/rabbitmq.conf": "ssl_options.certfile = /etc/b.pem\nmanagement.ssl_options.certfile = /etc/b.pem\n",
        "etc/postgresql/17/main/postgresql.conf": "ssl_cert_file = '/etc/ssl/certs/ssl-cert-snakeoil.pem'\n",
        "var/lib/pgsql/data/conf.d/50-ansible.conf": "ssl_cert_file = '/etc/c.pem'\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    assert host_status.certificates(str(tmp_path))[0]["error"] == "The program openssl is not installed."
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=10, hours=1)
    text = end.strftime("%b %d %H:%M:%S %Y GMT")
    programs(
        "openssl",
        f"import sys\nif sys.argv[-1] == '/etc/a.pem': print('notAfter={text}')\n"
        "else: print('Could not open /etc/b.pem\\nmore', file=sys.stderr); sys.exit(1)",
    )
    assert host_status.certificates(str(tmp_path)) == [
        {"path": "/etc/a.pem", "file": "nginx.conf", "days": 10},
        {"path": "/etc/b.pem", "file": "rabbitmq.conf", "error": "Could not open /etc/b.pem"},
        {"path": "/etc/c.pem", "file": "50-ansible.conf", "error": "Could not open /etc/b.pem"},
    ]


API_ANSWERS = {
    "overview": {"rabbitmq_version": "4.0.5", "erlang_version": "27.3", "cluster_name": "c", "node": "rabbit@a"},
    "nodes": [{"name": "rabbit@a", "running": True}],
    "queues/%2Fshop": [{"name": "mail"}],
    "deprecated-features/used": [{"name": "b"}, {"name": "a"}],
}


class Api:
    def __init__(self, url, user, password, timeout, ca_file):
        wanted = ("https://127.0.0.1:15671", "/ca.pem") if ca_file else ("http://127.0.0.1:15672", None)
        assert (url, ca_file) == wanted
        assert (user, password, timeout) == ("admin", "NeverShown", 0)

    def get(self, path):
        return API_ANSWERS[path.partition("?")[0]]


BROKER = {"url": "http://127.0.0.1:15672", "user": "admin", "password": "NeverShown", "vhost": "/shop"}


def test_broker_reports_queues_of_its_virtual_host(monkeypatch):
    monkeypatch.setattr(host_status, "ManagementApi", Api)
    assert host_status.broker(None) == {}
    found = host_status.broker({**BROKER, "ca_file": ""})
    assert found == host_status.broker({**BROKER, "url": "https://127.0.0.1:15671", "ca_file": "/ca.pem"})
    assert found["versions"] == {"RabbitMQ": "4.0.5", "Erlang": "27.3"}
    assert found["queues"] == [{"name": "mail"}] and found["deprecated"] == ["a", "b"]
    assert "NeverShown" not in json.dumps(found)


def test_silent_worker_is_reported(monkeypatch):
    answers = {}

    def as_worker(app, *command):
        assert app == "shop" and command[:3] == ("/opt/shop/current/venv/bin/celery", "--app", "shop.celery")
        assert re.fullmatch(r"--destination=mail@\S+,slow@\S+", command[-1])
        return subprocess.CompletedProcess(command, 0, answers["text"], "")

    monkeypatch.setattr(host_status, "as_worker", as_worker)
    monkeypatch.setattr(host_status.platform, "node", lambda: "a")
    options = {"app": "shop.celery", "names": ["mail", "slow"]}
    assert host_status.workers("shop", None) == []
    answers["text"] = '{"mail@a": {"ok": "pong"}}'
    assert [(each["name"], each["answers"]) for each in host_status.workers("shop", options)] == [("mail", True), ("slow", False)]
    answers["text"] = "Error: No nodes replied within time constraint"
    assert [each["answers"] for each in host_status.workers("shop", options)] == [False, False]


def test_program_of_a_release_runs_as_the_application_in_the_environment_of_a_worker(monkeypatch):
    calls = []
    monkeypatch.setattr(host_status, "run", lambda *words, **options: calls.append((words, options)))
    monkeypatch.setattr(host_status.os.path, "exists", lambda path: not path.endswith(".worker"))
    host_status.as_worker("shop", "celery", "status")
    monkeypatch.setattr(host_status.os.path, "exists", lambda path: True)
    host_status.as_worker("shop", "celery", "status")
    file, program = "/opt/shop/current/environment", ("--", "runuser", "-u", "shop", "--", "celery", "status")
    assert [words[4:] for words, _ in calls] == [(file, *program), (file, f"{file}.worker", *program)]
    _, options = calls[0]
    assert options == {"cwd": "/opt/shop/current", "environment": {"PYTHONNOUSERSITE": "1"}}


def test_application_reports_json(monkeypatch):
    results = []

    def run(*words):
        assert words == ("/usr/local/bin/shop-manage", "email_status", "--all")
        return subprocess.CompletedProcess(words, *results)

    monkeypatch.setattr(host_status, "run", run)
    assert host_status.application("shop", "") == {}
    results[:] = [0, '{"a": 1}', ""]
    assert host_status.application("shop", "email_status --all") == {"a": 1}
    results[:] = [1, "", "Traceback\nValueError: no database\n"]
    with pytest.raises(host_status.Failure, match="shop-manage email_status --all fails: ValueError: no database"):
        host_status.application("shop", "email_status --all")


def test_a_part_that_fails_is_named_and_the_others_are_returned(monkeypatch, capsys):
    def fail(*_):
        raise OSError("the disk is broken")

    monkeypatch.setattr(host_status, "disks", fail)
    with patch_module_args({"app": "shop", "controller_time": time.time()}), pytest.raises(SystemExit):
        module.main()
    result = json.loads(capsys.readouterr().out)
    assert result["changed"] is False
    assert result["status"]["errors"] == {"disks": "the disk is broken"}
    assert "disks" not in result["status"] and result["status"]["system"]["name"]


# ---- Findings ----


def host(name="web1", groups=("app", "web"), **status):
    healthy = {
        "errors": {},
        "system": {"name": "Debian", "memory": {"total": 1000, "available": 500}, "seconds_off": 0.2},
        "disks": [{"path": "/", "total": 1000, "free": 500}],
        "units": [{"name": "shop-web.service", "installed": True, "state": "active", "restarts": 0}],
        "versions": {"release": "abc"},
        "certificates": [{"path": "/a.pem", "days": 60}],
        "workers": [{"name": "mail", "answers": True}],
    }
    return {"name": name, "groups": list(groups), "failure": "", "status": {**healthy, **status}}


def queue(name="mail.v1", **values):
    members = {"members": ["a", "b", "c"], "online": ["a", "b", "c"], "leader": "a"}
    return {"name": name, "type": "quorum", "durable": True, "messages": 0, "consumers": 2, **members, **values}


def node(**values):
    return {"name": "rabbit@a", "running": True, "mem_alarm": False, "disk_free_alarm": False, "partitions": [], **values}


def report(*hosts, queues=None, nodes=None, deprecated=(), **values):
    broker = {"nodes": nodes or [node()], "queues": queues or [queue()], "deprecated": list(deprecated)}
    return {
        "environment": "staging",
        "app": "shop",
        "time": "2026-11-27 18:00:00 UTC",
        "hosts": list(hosts) or [host()],
        "queues": ["mail.v1"],
        "broker": broker,
        "application": {
            "oldest_due_seconds": 0,
            "oldest_unsent_seconds": 2,
            "needs_operator": 0,
            "states": {"sent": 3, "failed": 0},
        },
        "backups": [{"host": "web1", "name": "shop.pgc", "hours": 2.0}],
        "drift": None,
        **values,
    }


def test_healthy_environment_has_no_findings():
    assert status_report.findings(report()) == []
    assert status_report.findings(report(broker={}, queues=[])) == []


UNIT = {"name": "shop-web.service", "installed": True, "state": "active", "restarts": 0}


@pytest.mark.parametrize(
    ("changed", "level", "text"),
    [
        (report({**host(), "status": None, "failure": "Ansible can't connect."}), "fault", "web1: Ansible can't connect."),
        (report(host(errors={"broker": "no answer"})), "fault", "web1: The state of the broker can't be read: no answer"),
        (
            report(host(units=[{**UNIT, "state": "failed"}])),
            "fault",
            "web1: shop-web.service is failed. Its log: journalctl -u shop-web.service",
        ),
        (
            report(host(units=[{**UNIT, "state": "inactive", "installed": False}])),
            "fault",
            "web1: shop-web.service is not installed.",
        ),
        (report(host(units=[{**UNIT, "restarts": 3}])), "warning", "web1: systemd has restarted shop-web.service 3 times"),
        (report(host(workers=[{"name": "mail", "answers": False}])), "fault", "web1: The worker mail does not answer a ping"),
        (report(host(disks=[{"path": "/", "total": 1e12, "free": 1.4e11}])), "warning", "web1: / has 14 % free space (140.0 GB)."),
        (report(host(disks=[{"path": "/", "total": 1e9, "free": 4e7}])), "fault", "web1: / has 4 % free space (40 MB)."),
        (
            report(host(system={"memory": {"total": 1000, "available": 40}, "seconds_off": 0})),
            "warning",
            "web1: 4 % of the memory is available",
        ),
        (
            report(host(system={"memory": {"total": 0, "available": 0}, "seconds_off": -31})),
            "warning",
            "web1: The clock differs from the controller's by -31 s.",
        ),
        (report(host(certificates=[{"path": "/a", "days": 20}])), "warning", "web1: The certificate /a expires in 20 days."),
        (report(host(certificates=[{"path": "/a", "days": 2}])), "fault", "web1: The certificate /a expires in 2 days."),
        (report(host(certificates=[{"path": "/a", "days": -1}])), "fault", "web1: The certificate /a has expired."),
        (report(host(certificates=[{"path": "/a", "error": "none"}])), "warning", "web1: The certificate /a can't be read: none"),
        (report(nodes=[node(running=False)]), "fault", "The broker's node rabbit@a is not running."),
        (report(nodes=[node(partitions=["rabbit@b"])]), "fault", "The node rabbit@a has lost its connection to rabbit@b."),
        (report(nodes=[node(mem_alarm=True)]), "fault", "The node rabbit@a has a memory alarm"),
        (report(nodes=[node(disk_free_alarm=True)]), "fault", "The node rabbit@a has a disk alarm"),
        (report(deprecated=["global_qos"]), "warning", "The deprecated feature global_qos is in use."),
        (report(queues=[queue("other")]), "fault", "The queue mail.v1 of a worker does not exist."),
        (report(queues=[queue(consumers=0, messages=1)]), "fault", "The queue mail.v1 has no consumer; 1 message wait."),
        (
            report(queues=[queue(), queue("dead", consumers=0, messages=2)]),
            "warning",
            "The queue dead has 2 messages, and no worker",
        ),
        (report(queues=[queue(messages=10_001)]), "warning", "10,001 messages wait in the queue mail.v1."),
        (report(queues=[queue(leader="")]), "fault", "The queue mail.v1 has no leader"),
        (report(queues=[queue(online=["a", "c"])]), "warning", "Members of the queue mail.v1 are not running on b."),
        (
            report(host(), host("web2", versions={"release": "def"})),
            "warning",
            "The hosts have different releases: abc on web1; def on web2. Run site.yml.",
        ),
        (report(application={"oldest_due_seconds": 61}), "fault", "A due delivery has waited 61 seconds for the relay."),
        (report(application={"oldest_unsent_seconds": 7200}), "warning", "The oldest unsent email is 2 hours old."),
        (report(application={"needs_operator": 2}), "warning", "2 deliveries failed or held."),
        (report(backups=[{"host": "db", "name": "x", "hours": None}]), "warning", "db: There is no backup x."),
        (report(backups=[{"host": "db", "name": "x", "hours": 49}]), "warning", "db: The backup x is 2 days old."),
        (report(drift={"web1": ["Write a file"], "db": []}), "warning", "web1: site.yml would change 1 task: Write a file."),
    ],
)
def test_each_fault_and_warning_is_found(changed, level, text):
    (found,) = status_report.findings(changed)
    assert found.level == level
    assert ((f"{found.host}: " if found.host else "") + found.text).startswith(text)
    state = status_report.state([found])
    assert (state, status_report.EXIT_CODES[state]) == {"fault": ("faults", 2), "warning": ("warnings", 1)}[level]


@pytest.mark.parametrize("name", ["celery_delayed_7", "mail@web1.celery.pidbox"])
def test_messages_in_queues_that_celery_declares_are_not_reported(name):
    found = report(queues=[queue(), queue(name, consumers=0, messages=3)])
    assert status_report.findings(found) == []
    assert name in status_report.table(found, [])


def test_messages_in_a_queue_that_is_not_durable_are_not_reported():
    assert status_report.findings(report(queues=[queue(), queue("celeryev.1", consumers=0, messages=3, durable=False)])) == []


def test_faults_come_before_warnings():
    found = status_report.findings(report(host(certificates=[{"path": "/a", "days": 20}]), nodes=[node(mem_alarm=True)]))
    assert [finding.level for finding in found] == ["fault", "warning"]
    assert status_report.headline(found) == "1 fault and 1 warning"


# ---- Table and page ----


def test_table_has_aligned_columns_and_all_parts():
    data = report(host(), host("a-longer-name", groups=("broker",)), queues=[queue(), queue("celery_delayed_1", messages=0)])
    text = status_report.table(data, status_report.findings(data))
    assert text.startswith("shop in staging, 2026-11-27 18:00:00 UTC: healthy\n")
    lines = text.splitlines()
    start = lines.index("Hosts") + 1
    assert {line.index(word) for line, word in zip(lines[start : start + 3], ("groups", "app", "broker"), strict=True)} == {
        lines[start].index("groups")
    }
    assert "3 of 3" in text and "celery_delayed_1" not in text
    assert re.search(r"oldest unsent +2 seconds", text) and re.search(r"states +sent 3\n", text)
    assert re.search(r"/a.pem +60 days", text) and re.search(r"shop.pgc +2 hours", text)


def test_host_that_does_not_answer_is_in_table_and_page():
    data = report({**host("down", groups=("web",)), "status": None, "failure": "Ansible can't connect."})
    found = status_report.findings(data)
    assert re.search(r"down +fault +web +no answer\n", status_report.table(data, found))
    page = status_page.page(data, found)
    assert '<circle class="fault"' in page and "Ansible can&#x27;t connect." in page


class Checker(HTMLParser):
    """Collects the elements that are not closed, and the addresses of other files."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.wrong = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.mark.parametrize(
    "data",
    [
        report(),
        report(
            host(
                "<b>",
                groups=("app", "web", "workers", "flower", "proxy", "database", "broker"),
                workers=[{"name": "w", "answers": False}],
            ),
            host("a-very-long-name-of-a-host.example.com"),
            drift={"<b>": ["x"]},
        ),
        report(broker={}, application={}, backups=[]),
    ],
)
def test_page_is_complete_and_needs_no_other_file(data):
    page = status_page.page(data, status_report.findings(data))
    checker = Checker()
    checker.feed(page)
    assert (checker.open, checker.wrong, checker.addresses) == ([], [], [])
    assert "<b>:" not in page and "prefers-color-scheme: dark" in page and "<svg" in page
    assert not re.search(r"https?://|@import|url\((?!#)", page)


# ---- Filters and script ----


def test_expected_units_follow_from_the_groups():
    def units(*groups):
        return filters.status_units("shop", groups, [{"name": "relay"}], [{"name": "mail"}], True)

    assert units("broker", "database", "proxy") == ["rabbitmq-server.service", "postgresql*.service", "nginx.service"]
    assert units("cache") == ["valkey*.service"]
    assert units("app", "web") == ["shop-web.service", "shop-relay.service"]
    assert units("app", "workers") == ["shop-relay.service", "shop-worker@mail.service", "shop-beat.service"]
    assert units("flower") == ["shop-flower.service"]
    assert "shop-beat.service" not in filters.status_units("shop", ["app", "workers"], [], [], False)


def test_failed_connection_becomes_the_failure_of_a_host():
    variables = {"inventory_hostname": "web1", "group_names": ["web", "app"]}
    entry = filters.host_entry(variables, {"unreachable": True, "msg": "No route"})
    assert entry["status"] is None and entry["failure"].startswith("Ansible can't connect: No route.")
    assert filters.host_entry(variables, {"status": {"errors": {}}}) == {
        "name": "web1",
        "groups": ["app", "web"],
        "status": {"errors": {}},
        "failure": "",
    }


def test_age_of_backups_on_the_controller(tmp_path):
    (tmp_path / "a.pgc").touch()
    os.utime(tmp_path / "a.pgc", (0, time.time() - 7200))
    assert filters.file_backups("db1", tmp_path, ["a.pgc", "b.pgc"]) == [
        {"host": "db1", "name": "a.pgc", "hours": 2.0},
        {"host": "db1", "name": "b.pgc", "hours": None},
    ]


def test_age_of_scheduled_backups(tmp_path):
    file = tmp_path / "success.prom"
    options = {"file": str(file), "kinds": ["postgresql", "rabbitmq"]}
    assert host_status.backups(None) == []
    assert host_status.backups(options) == [{"name": kind, "hours": None} for kind in ("postgresql", "rabbitmq")]
    # The host backed up its database, but never its broker.
    file.write_text(f'# HELP\nbackup_last_success_timestamp_seconds{{kind="postgresql"}} {int(time.time()) - 7200}\n')
    found = host_status.backups(options)
    assert found == [{"name": "postgresql", "hours": 2.0}, {"name": "rabbitmq", "hours": None}]
    assert filters.scheduled_backups({"status": {"backups": found}}, "db1") == [{"host": "db1", **each} for each in found]
    assert filters.scheduled_backups({"unreachable": True}, "db1") == []


def test_primary_reports_its_standbys(programs):
    assert host_status.replication(None) == host_status.replication({"port": 5432, "standbys": []}) == []
    options = {"port": 5433, "standbys": ["db-2", "db3"]}
    streaming = {"name": "standby_db_2", "state": "streaming", "mode": "quorum", "bytes": 12, "seconds": 0.5}
    # The words: runuser -u postgres -- psql …
    answer = json.dumps([streaming])
    programs("runuser", f"import sys\nassert '--port=5433' in sys.argv and sys.argv[4] == 'psql'\nprint({answer!r})\n")
    assert host_status.replication(options) == [
        {**streaming, "name": "db-2"},
        {"name": "db3", "state": "missing", "mode": "", "bytes": None, "seconds": None},
    ]
    programs("runuser", "import sys\nsys.exit('psql: connection refused')\n")
    with pytest.raises(host_status.Failure, match="connection refused"):
        host_status.replication(options)


def test_missing_or_late_standby_is_a_fault():
    def standby(**values):
        return host(
            "db1", replication=[{"name": "db2", "state": "streaming", "mode": "async", "bytes": 7, "seconds": 0.5, **values}]
        )

    healthy = report(standby())
    assert status_report.findings(healthy) == []
    assert "db1      db2      streaming  async  7 bytes, 0.5 s" in status_report.table(healthy, [])
    assert "<td>7 bytes, 0.5 s</td>" in status_page.page(healthy, [])
    missing = {"state": "missing", "bytes": None, "seconds": None}
    for values, text in (
        (missing, "The standby db2 is not streaming: missing."),
        ({"bytes": 200_000_000}, "The standby db2 is 200,000,000 bytes, 0.5 s behind."),
        ({"seconds": 90}, "The standby db2 is 7 bytes, 90 s behind."),
    ):
        assert status_report.findings(report(standby(**values))) == [("fault", "db1", text)]


def test_report_has_broker_and_application_from_the_first_host_with_them():
    application = {"needs_operator": 1}
    broker = {"node": "rabbit@b", "nodes": [], "queues": [], "deprecated": []}
    hosts = [
        {**host("down"), "status": None, "failure": "x"},
        host(broker={}, application={}),
        host("b", application=application, broker=broker),
    ]
    done = filters.status_report(hosts, "staging", "shop", [], [])
    assert done["report"]["application"] == application and done["report"]["broker"]["node"] == "rabbit@b"
    assert (done["report"]["state"], done["report"]["exit_code"]) == ("faults", 2)
    assert [finding["level"] for finding in done["report"]["findings"]] == ["fault", "warning"]
    assert done["text"].startswith("shop in staging, ") and done["page"].startswith("<!doctype html>")
    json.dumps(done)


def test_names_of_filters():
    assert set(filters.FilterModule().filters()) == {
        "file_backups",
        "host_entry",
        "scheduled_backups",
        "status_report",
        "status_units",
    }


def test_drift_is_read_from_a_run_in_check_mode():
    output = "a warning\n" + json.dumps(
        {
            "stats": {"a": {}, "b": {}},
            "plays": [
                {
                    "tasks": [
                        {"task": {"name": "Write"}, "hosts": {"a": {"changed": True}, "b": {"changed": False}}},
                        {"task": {"name": "Connect"}, "hosts": {"b": {"unreachable": True}}},
                    ]
                }
            ],
        }
    )
    assert load("scripts/status.py").changes(output) == {"a": ["Write"], "b": ["Connect (fails)"]}


def test_unknown_environment_is_refused():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/status.py", "--env", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--env is nowhere; there is no directory" in done.stderr
