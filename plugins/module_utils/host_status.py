"""Reads the state of a host of an environment: services, versions, disks, certificates, broker, workers, application and
backups.

Changes nothing. If a part can't be read, the other parts are still returned.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Optional
from urllib.parse import quote

from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.management_api import ManagementApi

# The time limit of one program, in seconds. Celery's ping waits 5 s for answers.
TIMEOUT = 60
PROPERTIES = "Id,LoadState,ActiveState,SubState,NRestarts,MemoryCurrent,StateChangeTimestampMonotonic"
# The settings that name a certificate, per configuration file.
CERTIFICATE_SETTINGS = {
    "etc/nginx/nginx.conf": r"^\s*ssl_certificate\s+([^;$]+);",
    "etc/rabbitmq/rabbitmq.conf": r"^\s*[\w.]*ssl_options\.certfile\s*=\s*(\S+)",
    "etc/postgresql/*/*/postgresql.conf": r"^\s*ssl_cert_file\s*=\s*'([^']+)'",
    "etc/postgresql/*/*/conf.d/*.conf": r"^\s*ssl_cert_file\s*=\s*'([^']+)'",
    "var/lib/pgsql/data/postgresql.conf": r"^\s*ssl_cert_file\s*=\s*'([^']+)'",
    "var/lib/pgsql/data/conf.d/*.conf": r"^\s*ssl_cert_file\s*=\s*'([^']+)'",
}
QUEUE_COLUMNS = "name,type,durable,messages,messages_ready,messages_unacknowledged,consumers,members,online,leader,state"
NODE_COLUMNS = "name,running,mem_alarm,disk_free_alarm,partitions,fd_used,fd_total,mem_used,mem_limit,disk_free,disk_free_limit"

# The WAL that a standby has not stored yet, and for how long it has not replayed a transaction.
REPLICATION_QUERY = """
SELECT coalesce(json_agg(json_build_object(
    'name', application_name, 'state', state, 'mode', sync_state,
    'bytes', greatest(0, pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn)),
    'seconds', round(extract(epoch FROM coalesce(replay_lag, '0')), 1)
)), '[]') FROM pg_stat_replication
"""
# The metric that the role backups writes.
BACKUP_TIME = r'^backup_last_success_timestamp_seconds\{kind="(\w+)"\} (\d+)$'


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", **options.pop("environment", {})}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env=environment, stdin=subprocess.DEVNULL, **options
    )


# The system


def system(controller_time: float, root: str = "/") -> dict[str, Any]:
    release = Path(root, "etc/os-release")
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', release.read_text(), re.MULTILINE) if release.exists() else None
    meminfo = Path(root, "proc/meminfo")
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)) if meminfo.exists() else {}
    return {
        "name": found[1] if found else platform.platform(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "processors": os.cpu_count() or 1,
        "memory": {"total": int(memory.get("MemTotal", 0)) * 1024, "available": int(memory.get("MemAvailable", 0)) * 1024},
        "seconds_off": round(time.time() - controller_time, 1),
    }


def disks(paths: list[str]) -> list[dict[str, Any]]:
    """Return the size and free space of each file system once, under the first of its paths."""
    found: dict[int, dict[str, Any]] = {}
    for path in filter(os.path.exists, paths):
        usage = shutil.disk_usage(path)
        found.setdefault(os.stat(path).st_dev, {"path": path, "total": usage.total, "free": usage.free})
    return list(found.values())


# Services


def matching(pattern: str, *options: str) -> list[str]:
    """Return the names of the loaded units that match a pattern."""
    lines = run("systemctl", "list-units", "--plain", "--no-legend", *options, pattern).stdout.splitlines()
    return [line.split()[0] for line in lines if line.split()]


def units(names: list[str], app: str) -> list[dict[str, Any]]:
    """Return the state of the named units, and of each failed unit of the application.

    A name can be a pattern. Inactive units count only if no other unit matches the pattern: on Debian,
    postgresql.service can be inactive while the units of its clusters are active.
    """
    if not shutil.which("systemctl"):
        return []
    wanted = [name for pattern in names for name in (matching(pattern) if "*" in pattern else []) or [pattern]]
    wanted = list(dict.fromkeys([*wanted, *matching(f"{app}-*", "--state=failed")]))
    if not wanted:
        return []
    shown = run("systemctl", "show", f"--property={PROPERTIES}", *wanted).stdout
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in shown.split("\n\n")]
    # systemctl prints nothing for a pattern that matches no unit.
    by_name = {values.get("Id"): values for values in blocks}
    found = []
    for name in wanted:
        values = by_name.get(name, {})
        memory = values.get("MemoryCurrent", "")
        found.append(
            {
                "name": name,
                "installed": values.get("LoadState") == "loaded",
                "state": values.get("ActiveState", "inactive"),
                "detail": values.get("SubState", ""),
                "restarts": int(values.get("NRestarts") or 0),
                # systemd prints the largest number for an unknown value.
                "memory": int(memory) if memory.isdigit() and int(memory) < 2**63 else None,
                "seconds": round(now - int(values.get("StateChangeTimestampMonotonic") or 0) / 1e6),
            }
        )
    return found


# Versions


def application_versions(app: str, root: str = "/") -> dict[str, str]:
    """Return the current release, and the versions of Python, Django and Celery in its virtual environment."""
    current = Path(root, "opt", app, "current")
    if not current.exists():
        return {}
    found = {"release": current.resolve().name}
    for library in sorted(current.glob("venv/lib/python*/site-packages")):
        found["Python"] = library.parent.name.removeprefix("python")
        for folder in library.glob("*.dist-info"):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            if name.lower() in ("django", "celery"):
                found[name.capitalize()] = version
    return found


def program_versions() -> dict[str, str]:
    """Return the versions of nginx and PostgreSQL, if their servers are installed."""
    found = {}
    if shutil.which("nginx"):
        found["nginx"] = run("nginx", "-v").stderr.strip().rpartition("/")[2].split(" ")[0]
    if shutil.which("psql"):
        version = re.search(r"(\d[\d.]*)", run("psql", "--version").stdout)
        if version:
            found["PostgreSQL"] = version[1]
    return found


# Certificates


def certificates(root: str = "/") -> list[dict[str, Any]]:
    """Return each certificate file that a service's configuration names, with the number of days until it expires."""
    paths: dict[str, str] = {}
    for pattern, setting in CERTIFICATE_SETTINGS.items():
        for file in sorted(Path(root).glob(pattern)):
            for path in re.findall(setting, file.read_text(errors="replace"), re.MULTILINE):
                # By default, PostgreSQL's configuration on Debian names this certificate. No client verifies it.
                if "ssl-cert-snakeoil" not in path:
                    paths.setdefault(path.strip(), file.name)
    return [{"path": path, "file": file, **validity(path)} for path, file in paths.items()]


def validity(path: str) -> dict[str, Any]:
    if not shutil.which("openssl"):
        return {"error": "The program openssl is not installed."}
    done = run("openssl", "x509", "-noout", "-enddate", "-in", path)
    found = re.search(r"notAfter=(.*)", done.stdout)
    if not found:
        return {"error": (done.stderr.strip().splitlines() or ["no certificate"])[0]}
    # The C library's names of months are English, since LC_ALL is C.
    end = datetime.strptime(found[1].strip(), "%b %d %H:%M:%S %Y %Z").replace(tzinfo=timezone.utc)
    return {"days": (end - datetime.now(timezone.utc)).days}


# Broker


def broker(options: Optional[dict[str, Any]]) -> dict[str, Any]:
    """Return versions, nodes, queues and used deprecated features from the management API of this host."""
    if not options:
        return {}
    # Without TLS, the file is an empty string.
    ca_file = options.get("ca_file") or None
    api = ManagementApi(options["url"], options["user"], options["password"], timeout=0, ca_file=ca_file)
    overview = api.get("overview")
    return {
        "versions": {"RabbitMQ": overview["rabbitmq_version"], "Erlang": overview["erlang_version"]},
        "cluster": overview["cluster_name"],
        "node": overview["node"],
        "nodes": api.get(f"nodes?columns={NODE_COLUMNS}"),
        "queues": api.get(f"queues/{quote(options['vhost'], safe='')}?columns={QUEUE_COLUMNS}"),
        "deprecated": sorted(feature["name"] for feature in api.get("deprecated-features/used") or []),
    }


# Application


def as_worker(app: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the current release as the application's user, with a worker's environment, which only root can read."""
    current = f"/opt/{app}/current"
    script = 'set -a; while [ "$1" != -- ]; do . "$1"; shift; done; set +a; shift; exec "$@"'
    files = [path for path in (f"{current}/environment", f"{current}/environment.worker") if os.path.exists(path)]
    words = ["sh", "-euc", script, "sh", *files, "--", "runuser", "-u", app, "--", *command]
    return run(*words, cwd=current, environment={"PYTHONNOUSERSITE": "1"})


def workers(app: str, options: Optional[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return whether each worker of this host answers a ping through the broker."""
    if not options or not options["names"]:
        return []
    nodes = {f"{name}@{platform.node()}": name for name in options["names"]}
    program = f"/opt/{app}/current/venv/bin/celery"
    arguments = ["--app", options["app"], "inspect", "ping", "--timeout=5", "--json", f"--destination={','.join(nodes)}"]
    done = as_worker(app, program, *arguments)
    try:
        answers = json.loads(done.stdout or "{}")
    except json.JSONDecodeError:
        answers = {}
    return [{"name": name, "node": node, "answers": node in answers} for node, name in nodes.items()]


def application(app: str, command: str) -> dict[str, Any]:
    """Return the JSON that a management command of the project prints."""
    if not command:
        return {}
    done = run(f"/usr/local/bin/{app}-manage", *command.split())
    if done.returncode:
        raise Failure(f"{app}-manage {command} fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# Backups


def backups(options: Optional[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the age of the last successful backup of each kind of data in hours, or None without one."""
    if not options:
        return []
    file = Path(options["file"])
    times = dict(re.findall(BACKUP_TIME, file.read_text(), re.MULTILINE)) if file.exists() else {}
    return [
        {"name": kind, "hours": round((time.time() - int(times[kind])) / 3600, 1) if kind in times else None}
        for kind in options["kinds"]
    ]


# Replication


def replication(options: Optional[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the state of each standby, as the primary reports it. A standby that is not connected has the state `missing`."""
    if not options or not options["standbys"]:
        return []
    psql = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", f"--port={options['port']}", "--dbname=postgres", "--command"]
    done = run("runuser", "-u", "postgres", "--", *psql, REPLICATION_QUERY, cwd="/")
    if done.returncode:
        raise Failure((done.stderr.strip().splitlines() or ["no message"])[-1])
    found = {each["name"]: each for each in json.loads(done.stdout)}
    missing = {"state": "missing", "mode": "", "bytes": None, "seconds": None}
    # The role postgresql gives the connections these names.
    slots = {name: f"standby_{re.sub('[^a-z0-9_]', '_', name.lower())}" for name in options["standbys"]}
    return [{**missing, **found.get(slot, {}), "name": name} for name, slot in slots.items()]


# All


def status(options: dict[str, Any]) -> dict[str, Any]:
    app = options["app"]
    found: dict[str, Any] = {"errors": {}}
    parts: dict[str, Callable[[], Any]] = {
        "system": lambda: system(options["controller_time"]),
        "disks": lambda: disks(options["disks"]),
        "units": lambda: units(options["units"], app),
        "versions": lambda: {**application_versions(app), **program_versions()},
        "certificates": certificates,
        "broker": lambda: broker(options["broker"]),
        "workers": lambda: workers(app, options["workers"]),
        "application": lambda: application(app, options["command"]),
        "backups": lambda: backups(options["backups"]),
        "replication": lambda: replication(options["replication"]),
    }
    for name, part in parts.items():
        try:
            found[name] = part()
        except (Failure, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            found["errors"][name] = str(error) or type(error).__name__
    return found
