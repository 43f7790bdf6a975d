"""Tests units from the role services: the sandbox from inside a unit, stops and restarts."""

from __future__ import annotations

import json


def properties(host, unit, *names):
    with host.sudo():
        shown = host.check_output(f"systemctl show --property {','.join(names)} {unit}")
    return dict(line.split("=", 1) for line in shown.splitlines())


def journal(host, unit):
    with host.sudo():
        return host.check_output(f"journalctl --output=cat --no-pager --unit {unit}")


def look(host):
    """The probe's output at its last start."""
    return json.loads([line for line in journal(host, "example-probe").splitlines() if line.startswith("{")][-1])


def test_sandbox_applies_inside_the_unit(host):
    seen = look(host)
    assert seen["write /usr"] == "Read-only file system"
    assert seen["process 1"] is False
    assert seen["meminfo"] is False
    assert seen["home"] == "Permission denied"
    assert seen["devices"] == ["null"]
    with host.sudo():
        for name, namespace in seen["namespaces"].items():
            assert namespace != host.check_output(f"readlink /proc/1/ns/{name}"), name


def test_unit_can_write_to_its_directories(host):
    seen = look(host)
    assert seen["write /var/lib/example"] == "done"
    assert seen["write /tmp"] == "done"
    assert not host.file("/tmp/probe").exists, "the unit's /tmp is not private"  # noqa: S108 - on the host


def test_environment_values_are_passed_unchanged(host):
    assert look(host)["environment"] == {"PERCENT": "100%h", "DOLLAR": "$HOME", "QUOTE": 'say "no"'}


def test_unlisted_service_is_removed(host):
    state = properties(host, "example-earlier.service", "ActiveState", "LoadState")
    assert state == {"ActiveState": "inactive", "LoadState": "not-found"}
    assert "example-earlier" not in host.check_output("ls /etc/systemd/system/example.target.wants")


def test_service_of_another_owner_is_not_changed(host):
    assert host.service("example-other").is_running


def test_target_stops_and_starts_all_services(host, eventually):
    with host.sudo():
        host.check_output("systemctl stop example.target")
        assert not host.service("example-probe").is_running
        host.check_output("systemctl start example.target")
    eventually(lambda: host.service("example-probe").is_running)


def test_connection_during_a_restart_waits_for_the_service(host):
    script = (
        "systemctl stop example-listener.service; "
        "python3 -c \"import socket; c = socket.create_connection(('127.0.0.1', 7000), 10); print(c.recv(9))\""
    )
    with host.sudo():
        assert "hello" in host.check_output(script)


def test_killed_service_restarts(host, eventually):
    before = properties(host, "example-probe.service", "MainPID")["MainPID"]
    with host.sudo():
        host.check_output(f"kill -KILL {before}")
    eventually(lambda: properties(host, "example-probe.service", "MainPID")["MainPID"] not in ("0", before))
