"""A host as the role firewall leaves it: which of its ports this machine reaches."""

from __future__ import annotations

import pytest
import requests


def reachable(url, port):
    """Whether the service on a port answers; a port that is closed says nothing, or no."""
    try:
        return requests.get(url(port), timeout=3).status_code == 200
    except requests.RequestException:
        return False


def test_listeners_answer_on_the_host_itself(host, eventually):
    for port in (7001, 7002, 7003):
        eventually(
            lambda port=port: host.run(f"python3 -c 'import urllib.request as r; r.urlopen(\"http://127.0.0.1:{port}\")'").rc == 0
        )


def test_port_is_open_to_those_who_are_listed(url):
    assert reachable(url, 7001)


@pytest.mark.parametrize("port", [pytest.param(7002, id="open to others"), pytest.param(7003, id="no longer listed")])
def test_port_is_closed_to_all_others(url, port):
    assert not reachable(url, port)


def test_rules_hold_after_a_reboot(host, url, reboot, eventually):
    with host.sudo():
        assert host.service("firewalld").is_enabled
    reboot()
    eventually(lambda: host.service("firewalld").is_running)
    eventually(lambda: reachable(url, 7001))
    assert not reachable(url, 7002)
    assert not reachable(url, 7003)
