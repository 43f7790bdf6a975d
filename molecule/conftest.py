"""What the scenarios' tests share: how to reach a host's services from here, and its journal when a test fails."""

from __future__ import annotations

import time

import pytest
import requests

UNITS = "--unit='rabbitmq-server*' --unit='mailroom*' --unit='example*'"


@pytest.fixture(scope="module")
def variables(host):
    """The host's inventory variables, as they stand there; only literal values, such as secrets, are of use."""
    return host.ansible.get_variables()


@pytest.fixture(scope="module")
def published(variables):
    """Gives for a port of the host the port of this machine's loopback on which it is published."""
    return lambda port: variables["testbed_published"][str(port)]


@pytest.fixture(scope="module")
def url(published):
    """Gives for a port of the host the base URL on this machine."""
    return lambda port: f"http://127.0.0.1:{published(port)}"


@pytest.fixture
def eventually():
    """Calls a check again and again until it neither raises nor is false; gives up after `seconds` with its last failure."""

    def check_until(check, seconds=30):
        until = time.monotonic() + seconds
        while True:
            try:
                result = check()
                assert result, f"still {result!r} after {seconds} s"
                return result
            except (AssertionError, requests.RequestException, OSError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    return check_until


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """On a failure, show what the host's services said."""
    report = (yield).get_result()
    if report.when == "call" and report.failed and "host" in item.funcargs:
        with item.funcargs["host"].sudo():
            journal = item.funcargs["host"].run(f"journalctl --no-pager --lines=60 --output=short-iso {UNITS}").stdout
        report.sections.append(("journal of the host", journal))
