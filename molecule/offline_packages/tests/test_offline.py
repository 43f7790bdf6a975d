"""The whole site on a host without a network."""

from __future__ import annotations

import pytest


@pytest.fixture
def site(url):
    return url(80)


def test_the_host_reaches_no_other_network(host):
    assert host.check_output("ip route show default") == ""
    # An IPv6 default route would also lead to a mirror.
    assert host.check_output("ip -6 route show default") == ""


def test_archive_is_the_only_source_of_apt(host):
    with host.sudo():
        assert {line.split()[1] for line in host.check_output("apt-get indextargets --format '$(TYPE) $(URI)'").splitlines()} == {
            "file:/var/lib/offline-packages/current/packages/./Packages"
        }


def test_an_email_is_sent(send, inbox, eventually):
    subject, _ = send()
    assert eventually(lambda: subject in inbox())
