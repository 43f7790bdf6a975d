"""Builds the configurations of Prometheus and Alertmanager, and lists the ports that Prometheus scrapes."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

MAIL_PORTS = {"smtp": 25, "smtp+tls": 587, "smtp+ssl": 465}


def scrapes(layers, groups, addresses, here=""):
    """Return the entries of `monitoring_scrapes` for the layers that have hosts.

    Each layer names a group and the port of its metrics. `addresses` maps the hosts to their addresses. `here` is the host that
    scrapes: it reaches its own ports on the loopback address.
    """
    entries = []
    for layer in layers:
        hosts = sorted(groups.get(layer["group"], []))
        targets = [
            {"host": host, "address": f"{'127.0.0.1' if host == here else _bracketed(addresses[host])}:{layer['port']}"}
            for host in hosts
        ]
        if targets:
            options = {key: value for key, value in layer.items() if key not in ("group", "port")}
            entries.append({**options, "targets": targets})
    return entries


def _bracketed(address):
    return f"[{address}]" if ":" in address else address


def scraped_ports(layers, groups, host):
    """Return the ports of a host that Prometheus scrapes, each once."""
    return sorted({int(layer["port"]) for layer in layers if host in groups.get(layer["group"], [])})


def scrape_configs(entries, name, directory):
    """Return the list `scrape_configs` of Prometheus from `monitoring_scrapes` with all defaults.

    The label `instance` is the host's name in the inventory, not its address, so that alerts name the host. The tokens are in
    files, because Prometheus shows its configuration on a page.
    """
    configs = []
    for entry in entries:
        config = {
            "job_name": f"{name}-{entry['job']}",
            "metrics_path": entry["path"],
            "static_configs": [
                {"targets": [target["address"]], "labels": {"instance": target["host"], "job": entry["job"], "app": name}}
                for target in entry["targets"]
            ],
        }
        if entry["params"]:
            config["params"] = entry["params"]
        if entry["token"]:
            config["authorization"] = {"credentials_file": token_file(entry, name, directory)}
        configs.append(config)
    return configs


def token_file(entry, name, directory):
    return f"{directory}/{name}-{entry['job']}.token"


def token_files(entries, name, directory):
    """Return the paths and texts of the files with the tokens."""
    return [{"path": token_file(entry, name, directory), "secret_content": entry["token"]} for entry in entries if entry["token"]]


def own_scrapes(host, address, login):
    """Return the scrape configurations for Prometheus itself and its Alertmanager."""
    return [
        {
            "job_name": job,
            "basic_auth": login,
            "static_configs": [{"targets": [f"{address}:{port}"], "labels": {"instance": host}}],
        }
        for job, port in (("prometheus", 9090), ("alertmanager", 9093))
    ]


def rule_groups(files):
    """Return the rule groups of files on the controller."""
    return [group for file in files for group in yaml.safe_load(Path(file).read_text(encoding="utf-8"))["groups"]]


def _mail_settings(url):
    """Return Alertmanager's global mail settings for a URL such as smtp+tls://user:password@host:587."""
    parts = urlsplit(url)
    settings = {
        "smtp_smarthost": f"{_bracketed(parts.hostname)}:{parts.port or MAIL_PORTS[parts.scheme]}",
        "smtp_require_tls": parts.scheme == "smtp+tls",
    }
    if parts.username:
        settings |= {"smtp_auth_username": unquote(parts.username), "smtp_auth_password": unquote(parts.password or "")}
    return settings


def mail_url_error(url):
    """Return why Alertmanager can't use the URL of a mail server, or an empty string. The text does not contain the URL."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        return "a malformed host or port"
    if scheme not in MAIL_PORTS or not host:
        return f"no host, or a scheme other than {', '.join(MAIL_PORTS)}"
    if scheme == "smtp+ssl" and port not in (None, 465):
        return "the scheme smtp+ssl, which Alertmanager supports only at port 465"
    return ""


def alertmanager_config(mail_url, emails, sender, webhooks):
    """Return Alertmanager's configuration: one receiver, which gets all alerts by email and by webhooks."""
    receiver = {
        "name": "team",
        "email_configs": [{"to": address, "send_resolved": True} for address in emails],
        "webhook_configs": [{"url": url, "send_resolved": True} for url in webhooks],
    }
    route = {"receiver": "team", "group_by": ["alertname", "app"], "group_wait": "30s", "repeat_interval": "12h"}
    mail = {"smtp_from": sender, **_mail_settings(mail_url)} if emails else {}
    return {"global": mail, "route": route, "receivers": [receiver]}


class FilterModule:
    def filters(self):
        return {
            "alertmanager_config": alertmanager_config,
            "mail_url_error": mail_url_error,
            "own_scrapes": own_scrapes,
            "rule_groups": rule_groups,
            "scrape_configs": scrape_configs,
            "scraped_ports": scraped_ports,
            "scrapes": scrapes,
            "token_files": token_files,
        }
