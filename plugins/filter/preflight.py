"""Prepares playbooks/preflight.yml: the options of the module preflight, and the report of all hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.django_celery.stack.plugins.filter.platform import platform_family
from ansible_collections.django_celery.stack.plugins.filter.role_variables import role_options
from jinja2 import pass_context

ROLES = Path(__file__).resolve().parents[2] / "roles"
MAIL_PORTS = {"smtp": 25, "smtp+tls": 587, "smtp+ssl": 465}
# Erlang's port mapper, and the broker's port for other nodes and command-line tools.
ERLANG_PORTS = ["4369", "25672"]


class RoleVariables:
    """The variables of a host, with the defaults of the roles."""

    def __init__(self, context, names):
        self.context, self.names = context, names

    def get(self, role, name):
        if name in self.names:
            return self.context.resolve(name)
        return role_options(ROLES / role)[name].get("default")

    def ports(self, role, *names):
        """Return the ports of addresses such as 127.0.0.1:5672. A socket in the file system has no port."""
        values = [self.get(role, name) for name in names]
        addresses = [address for value in values for address in (value if isinstance(value, list) else [value])]
        return [str(address).rpartition(":")[2] for address in addresses if not str(address).startswith("/")]


def host_ports(values, app, groups):
    """Return the ports that the layers of a host use, each with a regular expression of the units that may use it."""
    app = re.escape(app)
    layers = {
        "broker": (
            [
                *values.ports("rabbitmq", "rabbitmq_listeners", "rabbitmq_management_listener", "rabbitmq_prometheus_listener"),
                *ERLANG_PORTS,
            ],
            r"rabbitmq-server\.service|epmd\.(service|socket)",
        ),
        "database": (values.ports("postgresql", "postgresql_port"), r"postgresql([@-].*)?\.service"),
        "cache": (values.ports("valkey", "valkey_port"), r"valkey(-server)?\.service"),
        "web": (values.ports("django", "django_web_listen"), rf"{app}-web(-standby)?\.(service|socket)"),
        "flower": (values.ports("flower", "flower_port"), rf"{app}-flower\.service"),
        "proxy": (["80", "443"], r"nginx\.service"),
        "monitoring": (["9090", "9093"], r"prometheus(-alertmanager)?\.service"),
    }
    return {port: pattern for group, (ports, pattern) in layers.items() if group in groups for port in ports}


@cache
def default_package_index():
    """Return the URL of pip's default package index. pip shows the URL only in its help; no other public interface has it."""
    words = [sys.executable, "-m", "pip", "download", "--help"]
    # On a wide terminal, pip does not wrap the URL.
    done = subprocess.run(words, env={**os.environ, "COLUMNS": "300"}, capture_output=True, text=True, check=True)
    found = re.search(r"--index-url\b[^)]*\(default\s+([^)]+)\)", done.stdout)
    if not found:
        raise AnsibleFilterError("The help of pip names no default package index. Set host_package_index_url.")
    return f"{found[1].rstrip('/')}/"


def host_urls(values, platform, source, groups):
    """Return the URLs of the package index, of Team RabbitMQ's repositories and of the ACME server, if the host needs them."""
    urls = []
    if "proxy" in groups and (directory := values.get("nginx", "nginx_acme_directory_url")):
        urls.append(directory)
    if {"app", "flower"} & set(groups):
        urls.append(values.get("django", "host_package_index_url") or default_package_index())
    for role in ("erlang", "rabbitmq") if "broker" in groups else ():
        wanted = values.get(role, f"{role}_source")
        if (source if wanted == "automatic" else wanted) == "team_rabbitmq":
            file = ROLES / role / "vars" / f"{'RedHat' if platform.startswith('el') else 'Debian'}.yml"
            team = yaml.safe_load(file.read_text(encoding="utf-8"))[f"__{role}_team_urls"]
            urls += values.get(role, f"{role}_repository_urls") or team
    return urls


def mail_server(url):
    """Return the mail server of EMAIL_URL, or None if the application has no mail server."""
    parts = urlsplit(url)
    if parts.scheme not in MAIL_PORTS:
        return None
    return {"host": parts.hostname, "port": parts.port or MAIL_PORTS[parts.scheme], "tls": parts.scheme == "smtp+ssl"}


@pass_context
def preflight_options(context, names, quick=False):
    """Return options of the module preflight for a host. `names` are the names of the host's variables.

    With `quick`, the module connects to no other host.
    """
    values = RoleVariables(context, names)
    groups, platform = context.resolve("group_names"), context.resolve("host_platform")
    source = context.resolve("wiring_versions").get(platform, {}).get("source", "distribution")
    ports = host_ports(values, context.resolve("app_name"), groups)
    if quick:
        return {"ports": ports, "package_sources": False, "urls": []}
    email = context.resolve("app_email_url") if "workers" in groups and "app_email_url" in names else ""
    # The host needs no index, since a run copies the archive with all packages to it.
    offline = bool(values.get("offline_packages", "offline_packages_archive"))
    return {
        "ports": ports,
        "package_sources": not offline,
        "urls": [] if offline else host_urls(values, platform, source, groups),
        **({"mail_server": server} if (server := mail_server(email)) else {}),
    }


def platform_problems(facts, platform):
    """Return problems of a host's operating system: not supported, or different from `host_platform`."""
    try:
        family = platform_family(facts)
    except AnsibleFilterError as error:
        return [str(error)]
    version = facts["distribution_version" if facts["distribution"] == "Ubuntu" else "distribution_major_version"]
    name = {"RedHat": "el", "Darwin": "macos"}.get(family, facts["distribution"].lower())
    actual = name + ("" if family == "Darwin" else version.replace(".", ""))
    # host_platform has no value for Debian testing.
    if actual == platform or "/" in version:
        return []
    return [f"The host has {facts['distribution']} {version}, and host_platform is {platform}. Set host_platform to {actual}."]


def failure_problem(result, step):
    """Return the problem of a host on which a step of the playbook failed: `connect`, `become` or `inspect`."""
    # The action gather_facts reports the result of the module setup.
    for failed in result.get("failed_modules", {}).values():
        result = failed
    texts = (result.get("msg"), result.get("module_stderr"), result.get("module_stdout"))
    text = " ".join(" ".join(str(each) for each in texts if each).split()).removeprefix("Task failed: ").rstrip(".")
    if result.get("unreachable"):
        return f"Ansible can't connect: {text}. Correct the address, the user (ansible_user) or the SSH key."
    if step == "connect":
        return f"Python 3.9 or newer does not run: {text}. Install it, or set ansible_python_interpreter."
    if step == "become":
        return f"sudo fails: {text}. Permit the user sudo, without a password or with --ask-become-pass."
    return f"The inspection fails: {text}."


def host_problems(variables):
    """Return the problems of a host, from its variables after the tasks of the playbook."""
    facts, reached = variables["ansible_facts"], variables["preflight_facts"]
    found = variables.get("preflight_host", {}).get("problems", [])
    if "preflight_failure" in variables:
        found = [failure_problem(variables["preflight_failure"], variables["preflight_step"])]
    elif reached.get("unreachable"):
        found = [failure_problem(reached, "connect")]
    return (platform_problems(facts, variables["host_platform"]) if "os_family" in facts else []) + found


def report(problems, title):
    """Return the report: a heading, and one line per problem, grouped by host. `problems` are the problems by host."""
    count = sum(map(len, problems.values()))
    if not count:
        return ""
    return "\n".join(
        [
            f"{count} {title}{'s' if count > 1 else ''}:",
            *(f"  {host}: {line}" for host, lines in problems.items() for line in lines),
        ]
    )


def preflight_problems(hosts, hostvars):
    return report({host: host_problems(hostvars[host]) for host in hosts}, "problem")


def preflight_warnings(hosts, hostvars):
    return report({host: hostvars[host].get("preflight_host", {}).get("warned", []) for host in hosts}, "warning")


class FilterModule:
    def filters(self):
        return {
            "preflight_options": preflight_options,
            "preflight_problems": preflight_problems,
            "preflight_warnings": preflight_warnings,
        }
