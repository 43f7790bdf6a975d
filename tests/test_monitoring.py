"""Tests the filters of the role monitoring, and that each alert has a runbook."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from ansible_collections.django_celery.stack.plugins.filter import monitoring
from helpers import ROOT, load

GROUPS = {"all": ["db1", "mon1", "web2", "web1"], "web": ["web2", "web1"], "flower": []}
ADDRESSES = {"db1": "192.0.2.1", "mon1": "192.0.2.9", "web1": "192.0.2.2", "web2": "2001:db8::3"}
LAYERS = [
    {"job": "node", "group": "all", "port": 9100},
    {"job": "app", "group": "web", "port": 8000, "token": "t0ken"},
    {"job": "slow", "group": "web", "port": 8000, "path": "/slow"},
    {"job": "flower", "group": "flower", "port": 5555},
    {"job": "postgresql", "group": "database", "port": 9187},
]
RULES = [ROOT / "roles/monitoring/files/rules.yml", ROOT / "app/alerts.yml"]
ALERTS = [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def test_scrapes_have_the_hosts_of_each_group():
    found = {entry["job"]: entry for entry in monitoring.scrapes(LAYERS, GROUPS, ADDRESSES, "mon1")}
    assert found.keys() == {"node", "app", "slow"}, "groups without hosts have no entry"
    assert found["node"]["targets"] == [
        {"host": "db1", "address": "192.0.2.1:9100"},
        {"host": "mon1", "address": "127.0.0.1:9100"},
        {"host": "web1", "address": "192.0.2.2:9100"},
        {"host": "web2", "address": "[2001:db8::3]:9100"},
    ]
    assert found["app"]["token"] == "t0ken"  # noqa: S105 - not a secret
    assert "group" not in found["app"] and "port" not in found["app"]


@pytest.mark.parametrize(("host", "ports"), [("web1", [8000, 9100]), ("db1", [9100]), ("other", [])])
def test_scraped_ports_are_listed_once(host, ports):
    assert monitoring.scraped_ports(LAYERS, GROUPS, host) == ports


def test_scrape_configs_name_hosts_and_contain_no_token():
    entry = {
        "job": "app",
        "path": "/metrics",
        "params": {},
        "token": "t0ken",
        "targets": [{"host": "web1", "address": "192.0.2.2:8000"}],
    }
    plain = {**entry, "job": "queues", "path": "/detailed", "params": {"family": ["a", "b"]}, "token": ""}
    configs = monitoring.scrape_configs([entry, plain], "shop", "/etc/tokens")
    assert "t0ken" not in str(configs)
    assert configs[0] == {
        "job_name": "shop-app",
        "metrics_path": "/metrics",
        "static_configs": [{"targets": ["192.0.2.2:8000"], "labels": {"instance": "web1", "job": "app", "app": "shop"}}],
        "authorization": {"credentials_file": "/etc/tokens/shop-app.token"},
    }
    assert configs[1]["params"] == {"family": ["a", "b"]} and "authorization" not in configs[1]
    assert monitoring.token_files([entry, plain], "shop", "/etc/tokens") == [
        {"path": "/etc/tokens/shop-app.token", "secret_content": "t0ken"}
    ]


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("smtp://mail.example.org", {"smtp_smarthost": "mail.example.org:25", "smtp_require_tls": False}),
        ("smtp://[::1]:2525", {"smtp_smarthost": "[::1]:2525", "smtp_require_tls": False}),
        (
            "smtp+tls://me%40example.org:p%2Fw@mail.example.org",
            {
                "smtp_smarthost": "mail.example.org:587",
                "smtp_require_tls": True,
                "smtp_auth_username": "me@example.org",
                "smtp_auth_password": "p/w",
            },
        ),
        ("smtp+ssl://mail.example.org", {"smtp_smarthost": "mail.example.org:465", "smtp_require_tls": False}),
    ],
)
def test_alertmanager_uses_the_mail_servers_url(url, settings):
    assert monitoring.mail_url_error(url) == ""
    config = monitoring.alertmanager_config(url, ["a@example.org"], "alerts@example.org", ["https://hooks.example.org/1"])
    assert config["global"] == {"smtp_from": "alerts@example.org", **settings}
    (receiver,) = config["receivers"]
    assert receiver["email_configs"] == [{"to": "a@example.org", "send_resolved": True}]
    assert receiver["webhook_configs"] == [{"url": "https://hooks.example.org/1", "send_resolved": True}]
    assert config["route"]["receiver"] == receiver["name"]


def test_alertmanager_without_receivers_needs_no_mail_server():
    config = monitoring.alertmanager_config("consolemail://", [], "", [])
    assert config["global"] == {}
    assert config["receivers"] == [{"name": "team", "email_configs": [], "webhook_configs": []}]


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("", "no host, or a scheme other than smtp, smtp+tls, smtp+ssl"),
        ("consolemail://", "no host, or a scheme other than"),
        ("smtp://", "no host, or a scheme other than"),
        ("smtp://host:port", "a malformed host or port"),
        ("smtp+ssl://host:2465", "the scheme smtp+ssl, which Alertmanager supports only at port 465"),
    ],
)
def test_url_that_alertmanager_does_not_support_is_refused(url, error):
    assert monitoring.mail_url_error(url).startswith(error)


def test_rule_groups_of_several_files_are_joined():
    groups = monitoring.rule_groups(RULES)
    assert [group["name"] for group in groups] == ["hosts", "services", "rabbitmq", "postgresql", "mailroom"]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_has_a_severity_and_a_heading_in_the_runbook(alert):
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert alert["alert"] in headings
    assert alert["annotations"]["runbook"] == f"docs/monitoring.md#{alert['alert'].lower()}"


def test_runbook_has_no_heading_without_an_alert():
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(alert["alert"] for alert in ALERTS)


DASHBOARDS = load("docs/generate_dashboards.py")


def test_dashboards_are_up_to_date_and_select_the_application():
    found = {file.stem: file.read_text() for file in (ROOT / "docs/dashboards").iterdir()}
    assert found == {name: DASHBOARDS.dashboard(name) for name in DASHBOARDS.DASHBOARDS}, (
        "python docs/generate_dashboards.py writes them"
    )
    for text in found.values():
        for panel in json.loads(text)["panels"]:
            assert panel["targets"] and all('app="$app"' in target["expr"] for target in panel["targets"]), panel["title"]
