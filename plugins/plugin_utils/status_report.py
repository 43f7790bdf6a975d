"""The status of an environment: findings from the state of its hosts, and a table for the terminal.

A finding is a fault, which stops or endangers the service, or a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Host = dict[str, Any]
Report = dict[str, Any]

FAULT, WARNING = "fault", "warning"
EXIT_CODES = {"healthy": 0, "warnings": 1, "faults": 2}

DISK_WARNING, DISK_FAULT = 15, 5  # percent free
MEMORY_WARNING = 5  # percent available
CERTIFICATE_WARNING, CERTIFICATE_FAULT = 21, 3  # days left
BACKUP_WARNING = 26  # hours: a daily backup and two hours for a late one
RESTARTS_WARNING = 3  # by systemd, since the last manual start of the unit
# The relay publishes a due delivery within a second. Otherwise it is not running, or the broker does not accept messages.
DUE_FAULT = 60  # seconds
UNSENT_WARNING = 600  # seconds
QUEUE_WARNING = 10_000  # messages
CLOCK_WARNING = 30  # seconds
REPLICATION_BYTES, REPLICATION_SECONDS = 100_000_000, 60  # a fault: a promotion would lose this much data, or take this long

# Queues that Celery declares: messages with a countdown, which no worker consumes, and remote control.
CELERY_QUEUE = re.compile(r"celery_delayed_\d+|.*\.celery\.pidbox")


class Finding(NamedTuple):
    level: str
    host: str
    text: str


def findings(report: Report) -> list[Finding]:
    """Return all faults, then all warnings."""
    found = [
        *(finding for host in report["hosts"] for finding in host_findings(host)),
        *broker_findings(report),
        *release_findings(report["hosts"]),
        *email_findings(report["app"], report["application"]),
        *backup_findings(report["backups"]),
        *drift_findings(report["drift"]),
    ]
    return sorted(dict.fromkeys(found), key=lambda finding: finding.level != FAULT)


def host_findings(host: Host) -> Iterator[Finding]:
    name, status = host["name"], host["status"]
    if status is None:
        yield Finding(FAULT, name, host["failure"])
        return
    for part, error in status["errors"].items():
        yield Finding(FAULT, name, f"The state of the {part} can't be read: {error}")
    for unit in status.get("units", []):
        if unit["state"] != "active":
            state = unit["state"] if unit["installed"] else "not installed"
            yield Finding(FAULT, name, f"{unit['name']} is {state}. Its log: journalctl -u {unit['name']}")
        elif unit["restarts"] >= RESTARTS_WARNING:
            yield Finding(WARNING, name, f"systemd has restarted {unit['name']} {unit['restarts']} times after failures.")
    for worker in status.get("workers", []):
        if not worker["answers"]:
            yield Finding(FAULT, name, f"The worker {worker['name']} does not answer a ping through the broker.")
    for disk in status.get("disks", []):
        percent = int(100 * disk["free"] // max(disk["total"], 1))
        if percent < DISK_WARNING:
            level = FAULT if percent < DISK_FAULT else WARNING
            yield Finding(level, name, f"{disk['path']} has {percent} % free space ({size(disk['free'])}).")
    yield from replication_findings(name, status.get("replication", []))
    yield from system_findings(name, status.get("system"))
    for certificate in status.get("certificates", []):
        if "error" in certificate:
            yield Finding(WARNING, name, f"The certificate {certificate['path']} can't be read: {certificate['error']}")
        elif certificate["days"] < CERTIFICATE_WARNING:
            level = FAULT if certificate["days"] < CERTIFICATE_FAULT else WARNING
            left = f"expires in {certificate['days']} days" if certificate["days"] >= 0 else "has expired"
            yield Finding(level, name, f"The certificate {certificate['path']} {left}.")


def replication_findings(name: str, standbys: list[dict[str, Any]]) -> Iterator[Finding]:
    for standby in standbys:
        if standby["state"] != "streaming":
            yield Finding(FAULT, name, f"The standby {standby['name']} is not streaming: {standby['state']}.")
        elif standby["bytes"] > REPLICATION_BYTES or standby["seconds"] > REPLICATION_SECONDS:
            yield Finding(FAULT, name, f"The standby {standby['name']} is {lag(standby)} behind.")


def system_findings(name: str, system: dict[str, Any] | None) -> Iterator[Finding]:
    if not system:
        return
    if system["memory"]["total"]:
        percent = 100 * system["memory"]["available"] // system["memory"]["total"]
        if percent < MEMORY_WARNING:
            yield Finding(WARNING, name, f"{percent} % of the memory is available ({size(system['memory']['available'])}).")
    if abs(system["seconds_off"]) > CLOCK_WARNING:
        yield Finding(WARNING, name, f"The clock differs from the controller's by {system['seconds_off']:.0f} s.")


def broker_findings(report: Report) -> Iterator[Finding]:
    """Yield the findings of the cluster, as the first broker that answered sees it."""
    broker = report["broker"]
    if not broker:
        return
    for node in broker["nodes"]:
        name = node["name"]
        if not node["running"]:
            yield Finding(FAULT, "", f"The broker's node {name} is not running.")
        if node.get("partitions"):
            yield Finding(FAULT, "", f"The node {name} has lost its connection to {', '.join(node['partitions'])}.")
        for alarm, cause in (("mem_alarm", "memory"), ("disk_free_alarm", "disk")):
            if node.get(alarm):
                yield Finding(FAULT, "", f"The node {name} has a {cause} alarm: the broker accepts no messages.")
    for feature in broker["deprecated"]:
        yield Finding(WARNING, "", f"The deprecated feature {feature} is in use. A later RabbitMQ refuses it.")
    queues = {queue["name"]: queue for queue in broker["queues"]}
    for name in report["queues"]:
        if name not in queues:
            yield Finding(FAULT, "", f"The queue {name} of a worker does not exist.")
    for name, queue in sorted(queues.items()):
        yield from queue_findings(queue, consumed=name in report["queues"])


def queue_findings(queue: dict[str, Any], consumed: bool) -> Iterator[Finding]:
    name, messages = queue["name"], queue.get("messages", 0)
    if consumed and not queue.get("consumers"):
        yield Finding(FAULT, "", f"The queue {name} has no consumer; {count(messages, 'message')} wait.")
    elif not consumed and messages and queue.get("durable") and not queue.get("consumers") and not CELERY_QUEUE.fullmatch(name):
        yield Finding(WARNING, "", f"The queue {name} has {count(messages, 'message')}, and no worker consumes it.")
    if consumed and messages > QUEUE_WARNING:
        yield Finding(WARNING, "", f"{count(messages, 'message')} wait in the queue {name}.")
    if queue.get("type") == "quorum":
        missing = sorted(set(queue.get("members", [])) - set(queue.get("online", [])))
        if not queue.get("leader"):
            yield Finding(FAULT, "", f"The queue {name} has no leader: a majority of its members is missing.")
        elif missing:
            yield Finding(WARNING, "", f"Members of the queue {name} are not running on {', '.join(missing)}.")


def release_findings(hosts: list[Host]) -> Iterator[Finding]:
    releases: dict[str, list[str]] = {}
    for host in hosts:
        if host["status"] and "app" in host["groups"]:
            releases.setdefault(host["status"].get("versions", {}).get("release", "none"), []).append(host["name"])
    if len(releases) > 1:
        listed = "; ".join(f"{release} on {', '.join(names)}" for release, names in sorted(releases.items()))
        yield Finding(WARNING, "", f"The hosts have different releases: {listed}. Run site.yml.")


def email_findings(app: str, application: dict[str, Any]) -> Iterator[Finding]:
    """Yield the findings of the project in app/. If another project's status has other keys, there are no findings."""
    due, unsent = application.get("oldest_due_seconds", 0), application.get("oldest_unsent_seconds", 0)
    if due > DUE_FAULT:
        yield Finding(FAULT, "", f"A due delivery has waited {duration(due)} for the relay.")
    elif unsent > UNSENT_WARNING:
        yield Finding(WARNING, "", f"The oldest unsent email is {duration(unsent)} old.")
    if dead := application.get("needs_operator", 0):
        failed = count(dead, "delivery", "deliveries")
        yield Finding(WARNING, "", f"{failed} failed or held. {app}-manage replay lists them; with --send it retries them.")


def backup_findings(backups: list[dict[str, Any]]) -> Iterator[Finding]:
    for backup in backups:
        if backup["hours"] is None:
            yield Finding(WARNING, backup["host"], f"There is no backup {backup['name']}.")
        elif backup["hours"] > BACKUP_WARNING:
            yield Finding(WARNING, backup["host"], f"The backup {backup['name']} is {duration(backup['hours'] * 3600)} old.")


def drift_findings(drift: dict[str, list[str]] | None) -> Iterator[Finding]:
    for host, tasks in (drift or {}).items():
        if tasks:
            yield Finding(WARNING, host, f"site.yml would change {count(len(tasks), 'task')}: {', '.join(tasks[:5])}.")


def state(found: list[Finding]) -> str:
    levels = {finding.level for finding in found}
    return "faults" if FAULT in levels else "warnings" if levels else "healthy"


# Text


def count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(octets: float) -> str:
    return f"{octets / 1e9:.1f} GB" if octets >= 1e9 else f"{octets / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return count(round(seconds / length), unit)
    return count(round(seconds), "second")


def host_versions(host: Host) -> dict[str, str]:
    status = host["status"] or {}
    return {**status.get("broker", {}).get("versions", {}), **status.get("versions", {})}


def worst(host: Host, found: list[Finding]) -> str:
    """Return the level of the worst finding of a host, or ok."""
    levels = {finding.level for finding in found if finding.host == host["name"]}
    return FAULT if FAULT in levels else WARNING if levels else "ok"


def rows(title: str, header: list[str], lines: list[list[str]]) -> list[str]:
    """Return a table with aligned columns."""
    if not lines:
        return []
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [header, *lines]]
    return ["", title, *(f"  {line}" for line in aligned)]


def host_rows(report: Report, found: list[Finding]) -> list[list[str]]:
    lines = []
    for host in report["hosts"]:
        status = host["status"] or {}
        units = status.get("units", [])
        running = sum(unit["state"] == "active" for unit in units)
        free = min((100 * disk["free"] // max(disk["total"], 1) for disk in status.get("disks", [])), default=None)
        lines.append(
            [
                host["name"],
                worst(host, found),
                ", ".join(host["groups"]),
                f"{running} of {len(units)}" if status else "no answer",
                "" if free is None else f"{free} %",
                status.get("system", {}).get("name", ""),
                ", ".join(f"{name} {version}" for name, version in host_versions(host).items()),
            ]
        )
    return lines


HOST_HEADER = ["host", "state", "groups", "services", "free disk", "system", "versions"]
QUEUE_HEADER = ["queue", "type", "messages", "ready", "unacked", "consumers", "members", "leader"]


def queue_rows(broker: dict[str, Any]) -> list[list[str]]:
    """Return one row per durable queue, except Celery's empty ones."""
    return [
        [
            queue["name"],
            queue.get("type", ""),
            *(f"{queue.get(key, 0):,}" for key in ("messages", "messages_ready", "messages_unacknowledged", "consumers")),
            f"{len(queue.get('online', []))} of {len(queue['members'])}" if queue.get("members") else "",
            queue.get("leader", ""),
        ]
        for queue in sorted(broker.get("queues", []), key=lambda queue: str(queue["name"]))
        if queue.get("durable") and (queue.get("messages") or not CELERY_QUEUE.fullmatch(queue["name"]))
    ]


def certificate_rows(hosts: list[Host]) -> list[list[str]]:
    return [
        [host["name"], certificate["path"], certificate.get("error") or f"{certificate['days']} days"]
        for host in hosts
        for certificate in (host["status"] or {}).get("certificates", [])
    ]


def lag(standby: dict[str, Any]) -> str:
    return "" if standby["bytes"] is None else f"{standby['bytes']:,} bytes, {standby['seconds']:g} s"


REPLICATION_HEADER = ["primary", "standby", "state", "mode", "lag"]


def replication_rows(hosts: list[Host]) -> list[list[str]]:
    return [
        [host["name"], standby["name"], standby["state"], standby["mode"], lag(standby)]
        for host in hosts
        for standby in (host["status"] or {}).get("replication", [])
    ]


def backup_rows(backups: list[dict[str, Any]]) -> list[list[str]]:
    return [[each["host"], each["name"], "none" if each["hours"] is None else duration(each["hours"] * 3600)] for each in backups]


def application_rows(application: dict[str, Any]) -> list[list[str]]:
    """Return one row per value; the emails by state in one row."""
    lines = []
    for key, value in application.items():
        name = key.replace("_", " ").removesuffix(" seconds")
        if isinstance(value, dict):
            text = ", ".join(f"{inner} {number}" for inner, number in value.items() if number) or "none"
        else:
            text = duration(value) if key.endswith("_seconds") else str(value)
        lines.append([name, text])
    return lines


def table(report: Report, found: list[Finding]) -> str:
    """Return the report for a terminal."""
    lines = [f"{report['app']} in {report['environment']}, {report['time']}: {headline(found)}"]
    lines += [f"  {finding.level.upper():<8}{finding.host + ': ' if finding.host else ''}{finding.text}" for finding in found]
    lines += rows("Hosts", HOST_HEADER, host_rows(report, found))
    lines += rows("Queues", QUEUE_HEADER, queue_rows(report["broker"]))
    lines += rows("Application, last 24 hours", ["", ""], application_rows(report["application"]))
    lines += rows("Replication", REPLICATION_HEADER, replication_rows(report["hosts"]))
    lines += rows("Certificates", ["host", "file", "left"], certificate_rows(report["hosts"]))
    lines += rows("Backups", ["host", "backup", "age"], backup_rows(report["backups"]))
    return "\n".join(line.rstrip() for line in lines)


def headline(found: list[Finding]) -> str:
    levels = [finding.level for finding in found]
    parts = [count(levels.count(level), level) for level in (FAULT, WARNING) if level in levels]
    return " and ".join(parts) or "healthy"
