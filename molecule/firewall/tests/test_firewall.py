"""Tests which ports of a host with the role firewall this machine can reach."""

from __future__ import annotations

import pytest
import requests


def reachable(url, port):
    """Whether the service on a port responds. A closed port drops or rejects packets."""
    try:
        return requests.get(url(port), timeout=3).status_code == 200
    except requests.RequestException:
        return False


def test_listeners_respond_on_the_host(host, eventually):
    for port in (7001, 7002, 7003):
        eventually(
            lambda port=port: host.run(f"python3 -c 'import urllib.request as r; r.urlopen(\"http://127.0.0.1:{port}\")'").rc == 0
        )


def test_port_is_open_to_listed_sources(url):
    assert reachable(url, 7001)


@pytest.mark.parametrize("port", [pytest.param(7002, id="open to others"), pytest.param(7003, id="no longer listed")])
def test_port_is_closed_to_other_sources(url, port):
    assert not reachable(url, port)


def test_rules_persist_after_a_reboot(host, url, reboot, eventually):
    with host.sudo():
        assert host.service("firewalld").is_enabled
    reboot()
    eventually(lambda: host.service("firewalld").is_running)
    eventually(lambda: reachable(url, 7001))
    assert not reachable(url, 7002)
    assert not reachable(url, 7003)
