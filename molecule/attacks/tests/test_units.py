"""Attacks from inside a unit: a copy of each unit starts a probe with the unit's restrictions."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

PROBE = Path(__file__).parents[1] / "files/probe.py"
UNITS = [
    "mailroom-web",
    "mailroom-relay",
    "mailroom-worker@mail",
    "mailroom-worker@maintenance",
    "mailroom-beat",
    "mailroom-flower",
    "rabbitmq-server",
    "epmd",
    "postgresql@17-main",
    "nginx",
]
# Directives that differ in the copy. All other directives are those of the unit.
RUN = """
[Service]
ExecCondition=
ExecStartPre=
ExecStart=
ExecStartPost=
ExecReload=
ExecStop=
ExecStopPost=
Type=oneshot
ExecStart=/usr/bin/python3 -I -c "import sys; exec(compile(sys.stdin.read(), 'probe', 'exec'))"
StandardInput=file:/run/attack/probe.py
StandardOutput=truncate:/run/attack/{unit}.json
StandardError=journal
Restart=no
PIDFile=
WatchdogSec=0
Sockets=
RuntimeDirectoryPreserve=yes
Environment=ATTACK_DIRECTORY={directory}
{user}
"""
# The actions that a unit permits, and the reasons.
ALLOWED = {
    # The broker reads the memory of the host, and Erlang its network interfaces.
    "rabbitmq-server": {"netlink socket", "read /proc/meminfo", "read /proc/cpuinfo"},
    # PostgreSQL compiles expressions, and Debian's pg_ctlcluster looks for the server's process.
    "postgresql@17-main": {"writable and executable memory", "memory made executable", "see other users' processes"},
    # nginx can read the files of the kernel in /proc, but sees only its own processes, whose environment has no secret.
    "nginx": {"read /proc/meminfo", "read /proc/cpuinfo", "read the environment of another process"},
}
# nginx's main process runs as root and reads no request. Its workers read requests, and run as this user.
USERS = {"nginx": "www-data"}
# Where a unit stores its data, if it has no StateDirectory=.
DIRECTORIES = {
    "rabbitmq-server": "/var/lib/rabbitmq",
    "postgresql@17-main": "/var/lib/postgresql/17/main",
    "nginx": "/var/lib/nginx/body",
}


@pytest.fixture(scope="module")
def results(host):
    """Returns the results of the probe in a unit."""
    found = {}

    def look(unit):
        if unit not in found:
            with host.sudo():
                found[unit] = probe(host, unit)
        return found[unit]

    return look


def probe(host, unit):
    lines, section = [], ""
    for line in host.check_output(f"systemctl cat {unit}.service").splitlines():
        section = line if line.startswith("[") else section
        # The dependencies in [Unit] would stop or start the unit itself.
        if section == "[Service]" or line.startswith("["):
            lines.append(line)
    instance = unit.partition("@")[2]
    user = f"User={USERS[unit]}" if unit in USERS else ""
    text = "\n".join(lines).replace("%i", instance).replace("%I", instance.replace("-", "/"))
    text += RUN.format(unit=unit, directory=DIRECTORIES.get(unit, ""), user=user)
    host.check_output("install -d -m 0777 /run/attack")
    write(host, "/run/attack/probe.py", PROBE.read_text())
    write(host, f"/run/systemd/system/attack-{unit.replace('@', '-')}.service", text)
    host.check_output("systemctl daemon-reload")
    done = host.run(f"systemctl start attack-{unit.replace('@', '-')}.service")
    assert done.rc == 0, host.run(f"journalctl --no-pager -n 30 -u attack-{unit.replace('@', '-')}").stdout + done.stderr
    return json.loads(host.check_output(f"cat /run/attack/{unit}.json"))


def write(host, path, text):
    quoted = text.replace("'", "'\\''")
    host.check_output(f"printf %s '{quoted}' >{path}")


def names():
    """Returns the names of the probe's actions."""
    return sorted(runpy.run_path(str(PROBE), run_name="names")["ACTS"])


@pytest.mark.attack(kind="from inside a unit")
@pytest.mark.parametrize("act", names())
@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_refused(results, unit, act):
    assert (results(unit)[act] == "done") == (act in ALLOWED.get(unit, ()))


@pytest.mark.parametrize("unit", UNITS)
def test_probe_itself_works(results, unit):
    """Without this test, attacks would seem to be refused if the probe could not run, for example without Python."""
    assert results(unit)["pid"] > 1
    assert results(unit)["write own directory"] == "done"


SECURITY = Path(__file__).parents[3] / "docs/security.md"
BEGIN, END = "<!-- The scenario `attacks` compares this table with the host. -->\n", "<!-- End of the table. -->\n"


def test_table_in_the_documentation_is_current(host, exposure, results):
    host.run("epmd -names")  # epmd.socket starts epmd
    lines = ["| Unit | Exposure | Refused actions | Permitted actions |", "|---|---|---|---|"]
    for unit in UNITS:
        acts = {name: result for name, result in results(unit).items() if name in names()}
        done = sorted(name for name, result in acts.items() if result == "done")
        lines.append(f"| `{unit}` | {exposure(unit)} | {len(acts) - len(done)} | {', '.join(done) or 'none'} |")
    table = "\n".join(lines) + "\n"
    found = SECURITY.read_text().partition(BEGIN)[2].partition(END)[0]
    assert found == table, f"Put this table into {SECURITY.name}:\n{table}"


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.startswith("mailroom-")])
def test_service_has_limits(host, unit):
    total = int(host.check_output("awk '/MemTotal/ {print $2 * 1024}' /proc/meminfo"))
    with host.sudo():
        text = host.check_output(f"systemctl show --property=MemoryMax,TasksMax,CPUWeight {unit}")
    shown = dict(line.split("=") for line in text.splitlines())
    assert shown["TasksMax"] == "1024"
    assert shown["CPUWeight"] == ("200" if unit == "mailroom-web" else "100")
    memory = int(shown["MemoryMax"])
    assert memory == 512 * 2**20 if unit == "mailroom-flower" else 0.79 * total < memory < 0.81 * total
