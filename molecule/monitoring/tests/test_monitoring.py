"""Tests the monitoring of a site on another host: targets, logins, queries, alerts that arrive, and refused rules."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import requests
import yaml

ROOT = Path(__file__).resolve().parents[3]
JOBS = {"node", "rabbitmq", "rabbitmq-queues", "postgresql", "flower", "app", "prometheus", "alertmanager"}
# Names of metrics in expressions of PromQL, with their selectors.
METRIC = re.compile(r"\b(?:up|(?:node|flower|rabbitmq|erlang|pg|mailroom|backup)_\w+)\b(?:\{[^}]*\})?")


# In this test, no task fails, so these metrics have no series.
WITHOUT_DATA = {'flower_events_total{type="task-failed"}'}


@pytest.fixture
def all_up(query):
    """Returns whether each target answers."""

    def check():
        found = {(each["metric"]["job"], each["metric"]["instance"]): each["value"][1] for each in query("up")}
        assert {job for job, _ in found} == JOBS
        assert {host for job, host in found if job == "node"} == {"mon1", "site1"}
        assert set(found.values()) == {"1"}, found
        return True

    return check


def test_all_targets_are_up(all_up, eventually):
    eventually(all_up, seconds=60)


def test_pages_require_the_login(url):
    for port, path in ((9090, "api/v1/query?query=up"), (9090, "metrics"), (9093, "api/v2/alerts"), (9093, "metrics")):
        assert requests.get(f"{url(port)}/{path}", timeout=10).status_code == 401, path


def test_pages_show_no_secret(url, variables, prometheus):
    login = ("monitoring", variables["secret_monitoring_password"])
    shown = prometheus("status/config")["yaml"] + requests.get(f"{url(9093)}/api/v2/status", auth=login, timeout=10).text
    shown += json.dumps(prometheus("targets")) + json.dumps(prometheus("status/flags"))
    assert "shop" not in shown and "mailroom-app" in shown
    for name in ("secret_monitoring_password", "secret_app_metrics_token", "secret_postgresql_monitoring_password"):
        assert variables[name] not in shown, name
    # A webhook's address can contain a token.
    assert "/alerts" not in shown


def test_amtool_silences_an_alert(on):
    silence = on("mon1", "amtool silence add alertname=Nothing --duration=1m --comment=test")
    assert silence in on("mon1", "amtool silence query --quiet")


def test_other_users_can_read_no_secret(host, variables, on):
    names = ("secret_monitoring_password", "secret_app_metrics_token", "secret_postgresql_monitoring_password")
    for machine in ("mon1", "site1"):
        for name in names:
            # With brackets, the pattern does not match the command line of this search.
            pattern = f"[{variables[name][0]}]{variables[name][1:]}"
            found = on(machine, f"runuser -u nobody -- grep -rsl -e '{pattern}' /etc /proc/[0-9]*/cmdline || true")
            assert found == "", (machine, name)
    with host.sudo():
        assert host.check_output("stat --format='%a %U %G' /etc/prometheus/tokens/mailroom-app.token") == "640 root prometheus"


def test_only_the_monitoring_host_reaches_the_metrics(on):
    address = on("mon1", "getent ahosts site1 | awk '{print $1; exit}'")
    for port in (9100, 9187, 15692, 5555, 8000):
        on("mon1", f"python3 -c 'import socket; socket.create_connection((\"site1\", {port}), timeout=3)'")
        with pytest.raises(OSError, match=r"timed out|No route|refused|unreachable"):
            socket.create_connection((address, port), timeout=2)
    # The pages listen on the loopback address.
    monitoring = on("mon1", "getent ahosts mon1 | awk '{print $1; exit}'")
    listeners = on("mon1", "ss --listening --tcp --numeric --no-header | awk '{print $4}'").split()
    assert {"127.0.0.1:9090", "127.0.0.1:9093", "127.0.0.1:9100"} <= set(listeners), monitoring
    assert [address for address in listeners if not address.startswith(("127.", "[::1]")) and not address.endswith(":22")] == []


def test_daemons_are_sandboxed(exposure, on, host):
    for unit in ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter"):
        assert exposure(f"{unit}.service") < 2.5, unit
    score = on("site1", "systemd-analyze security --no-pager prometheus-postgres-exporter.service | tail -n 1")
    assert float(score.split("level for ")[1].split()[1]) < 2.5, score


@pytest.fixture(scope="module")
def traffic(host, post_email):
    """Sends an email and writes the metric of a backup, so that all metrics have values."""
    web = host.get_host("ansible://site1")
    with web.sudo():
        now = web.check_output("date +%s")
        metric = f'backup_last_success_timestamp_seconds{{kind="postgresql"}} {now}'
        web.check_output("echo %s >/var/lib/prometheus/node-exporter/backup.prom", metric)
    post_email()


@pytest.mark.parametrize("file", ["roles/monitoring/files/rules.yml", "app/alerts.yml"])
def test_metrics_of_the_rules_exist(traffic, query, eventually, file):
    rules = [rule for group in yaml.safe_load((ROOT / file).read_text())["groups"] for rule in group["rules"]]
    assert rules

    def missing():
        expressions = [re.sub(r"\b(by|on) \([^)]*\)", "", rule["expr"]) for rule in rules]
        selectors = {selector for expression in expressions for selector in METRIC.findall(expression)}
        return {selector for selector in selectors - WITHOUT_DATA if not query(selector)}

    eventually(lambda: missing() == set() or pytest.fail(f"no data: {missing()}"), seconds=60)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "docs/dashboards").iterdir()))
def test_queries_of_the_dashboards_return_data(traffic, query, eventually, name):
    panels = json.loads((ROOT / f"docs/dashboards/{name}.json").read_text())["panels"]
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"].replace("$app", "mailroom")
            eventually(lambda expression=expression: query(expression) or pytest.fail(expression), seconds=60)


def test_no_alert_of_the_site_fires(query):
    firing = {each["metric"]["alertname"] for each in query('ALERTS{alertstate="firing"}')}
    # The hosts were created minutes ago, and their machine sets the clock.
    assert firing <= {"HostRebooted", "ClockWrong"}


def test_alert_of_a_stopped_service_arrives(host, on, inbox, eventually):
    def received(status):
        with host.sudo():
            lines = host.check_output("cat /var/tmp/alerts.jsonl 2>/dev/null || true").splitlines()
        alerts = [alert for line in lines if line for alert in json.loads(line)["alerts"]]
        return [alert for alert in alerts if alert["status"] == status and alert["labels"].get("name") == "mailroom-relay.service"]

    def mails():
        return len([subject for subject in inbox() if "ServiceDown" in subject])

    on("mon1", "rm -f /var/tmp/alerts.jsonl")
    before = mails()
    on("site1", "systemctl stop mailroom-relay")
    try:
        (alert, *_) = eventually(lambda: received("firing"), seconds=240)
    finally:
        on("site1", "systemctl start mailroom-relay")
    assert alert["labels"]["alertname"] == "ServiceDown"
    assert (alert["labels"]["instance"], alert["labels"]["app"]) == ("site1", "mailroom")
    assert alert["annotations"] == {
        "summary": "mailroom-relay.service on site1 is not running",
        "runbook": "docs/monitoring.md#servicedown",
    }
    eventually(lambda: mails() > before, seconds=60)


def test_faulty_rules_are_refused_and_prometheus_keeps_the_current_ones(host, run_playbook, prometheus, tmp_path):
    faulty = tmp_path / "faulty.yml"
    faulty.write_text("groups: [{name: faulty, rules: [{alert: Faulty, expr: 'sum('}]}]\n")
    arguments = ("--tags", "monitoring")
    done = run_playbook("playbooks/monitoring.yml", *arguments, monitoring_rules=[str(faulty)])
    assert done.returncode == 2
    assert "Prometheus on mon1 would refuse its configuration or rules, so it was not reloaded:" in done.stdout, done.stdout
    assert "mailroom" in {group["name"] for group in prometheus("rules")["groups"]}
    done = run_playbook("playbooks/monitoring.yml", *arguments)
    assert done.returncode == 0, done.stdout
    done = run_playbook("playbooks/monitoring.yml", *arguments)
    assert "changed=0 " in done.stdout, done.stdout


def test_second_environment_uses_the_existing_prometheus(host, run_playbook, query, eventually):
    """The files of an environment that installs no Prometheus."""
    done = run_playbook(
        "playbooks/monitoring.yml", "--tags", "monitoring", monitoring_install=False, monitoring_name="other", monitoring_rules=[]
    )
    assert done.returncode == 0, done.stdout
    with host.sudo():
        host.check_output("systemctl reload prometheus")
        eventually(
            lambda: {each["metric"]["job"] for each in query('up{app="other"} == 1')} == JOBS - {"prometheus", "alertmanager"}
        )
        host.check_output("rm /etc/prometheus/*/other.yml /etc/prometheus/tokens/other-*; systemctl reload prometheus")


def test_monitoring_runs_after_a_reboot(host, all_up, reboot, eventually):
    reboot()
    eventually(lambda: host.service("prometheus").is_running)
    eventually(all_up, seconds=90)


def test_journal_is_limited_and_kept_on_disk(on, host):
    for name in ("mon1", "site1"):
        assert "MaxRetentionSec=3day" in on(name, "systemd-analyze cat-config systemd/journald.conf"), name
    # Random text, because journald compresses its files.
    on("mon1", "head -c 90M /dev/urandom | base64 --wrap=40000 | systemd-cat --identifier=filler; journalctl --sync")
    size = on("mon1", "du --summarize --bytes /var/log/journal | cut -f 1")
    assert 20e6 < int(size) <= 64 * 2**20


def test_log_of_one_email_is_in_the_order_of_time(post_email, run_playbook, eventually):
    """The web service and the worker log the email's id."""
    email = post_email()
    units = ["mailroom-web", "mailroom-worker@mail"]

    def found():
        done = run_playbook("playbooks/ops/email_log.yml", "--limit", "all", email=email)
        assert done.returncode == 0 and "changed=0 " in done.stdout, done.stdout + done.stderr
        lines = re.findall(rf"(\S+\+00:00) site1 (\S+): .*{email}", done.stdout)
        assert [time for time, _ in lines] == sorted(time for time, _ in lines)
        assert list(dict.fromkeys(unit for _, unit in lines)) == units, done.stdout
        return True

    eventually(found)
    done = run_playbook("playbooks/ops/email_log.yml", "--limit", "all", email="1 or 2")
    assert done.returncode == 2 and "email is '1 or 2'; allowed: the id of an email" in done.stdout
