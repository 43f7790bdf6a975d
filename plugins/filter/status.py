"""Prepares playbooks/ops/status.yml: the options of the module host_status, and the report of all hosts."""

from __future__ import annotations

import time
from pathlib import Path

from ansible_collections.django_celery.stack.plugins.filter.preflight import failure_problem
from ansible_collections.django_celery.stack.plugins.plugin_utils.status_page import page
from ansible_collections.django_celery.stack.plugins.plugin_utils.status_report import EXIT_CODES, findings, state, table

# The units of packages, per group. On Debian, PostgreSQL has one unit per cluster. Valkey's unit has a different name on EL.
PACKAGED = {
    "broker": "rabbitmq-server.service",
    "database": "postgresql*.service",
    "cache": "valkey*.service",
    "proxy": "nginx.service",
}


def status_units(app, groups, processes, workers, beat):
    """Return the units that run on a host. `processes` and `workers` are the lists of the roles django and celery."""
    units = [unit for group, unit in PACKAGED.items() if group in groups]
    if "web" in groups:
        units.append(f"{app}-web.service")
    if "app" in groups:
        units += [f"{app}-{process['name']}.service" for process in processes]
    if "workers" in groups:
        units += [f"{app}-worker@{worker['name']}.service" for worker in workers]
        units += [f"{app}-beat.service"] if beat else []
    if "flower" in groups:
        units.append(f"{app}-flower.service")
    return units


def host_entry(variables, result):
    """Return a host's part of the report. `result` is the result of the module host_status, or of the failed connection."""
    status = result.get("status")
    return {
        "name": variables["inventory_hostname"],
        "groups": sorted(variables["group_names"]),
        "status": status,
        "failure": "" if status else failure_problem(result, "inspect"),
    }


def file_backups(host, directory, names):
    """Return the ages of a host's backup files on the controller in hours, or None for a missing file."""
    return [
        {"host": host, "name": name, "hours": round((time.time() - file.stat().st_mtime) / 3600, 1) if file.exists() else None}
        for name in names
        for file in [Path(directory, name)]
    ]


def scheduled_backups(result, host):
    """Return the ages of a host's scheduled backups in hours. Return an empty list if the host did not answer."""
    return [{"host": host, **backup} for backup in (result.get("status") or {}).get("backups", [])]


def status_report(hosts, environment, app, queues, backups, drift=None):
    """Return the report with its findings, its exit code, and its text and page."""
    status = [host["status"] for host in hosts if host["status"]]
    report = {
        "environment": environment,
        "app": app,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "hosts": hosts,
        "queues": queues,
        "broker": next((each["broker"] for each in status if each.get("broker")), {}),
        "application": next((each["application"] for each in status if each.get("application")), {}),
        "backups": backups,
        "drift": drift,
    }
    found = findings(report)
    name = state(found)
    return {
        "report": {**report, "state": name, "exit_code": EXIT_CODES[name], "findings": [each._asdict() for each in found]},
        "text": table(report, found),
        "page": page(report, found),
    }


class FilterModule:
    def filters(self):
        return {
            "file_backups": file_backups,
            "host_entry": host_entry,
            "scheduled_backups": scheduled_backups,
            "status_report": status_report,
            "status_units": status_units,
        }
