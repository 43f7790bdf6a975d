"""Lynis rates the host before and after site.yml. prepare.yml wrote the first report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SECURITY = Path(__file__).parents[3] / "docs/security.md"
BEFORE, AFTER = "/var/log/lynis-before.dat", "/var/log/lynis-after.dat"


@pytest.fixture(scope="module")
def reports(host):
    """The lines of both reports."""
    with host.sudo():
        host.check_output(f"lynis audit system --cronjob --report-file {AFTER} --log-file /dev/null")
        return [host.check_output(f"cat {path}").splitlines() for path in (BEFORE, AFTER)]


def index(report):
    (value,) = [line.partition("=")[2] for line in report if line.startswith("hardening_index=")]
    return int(value)


@pytest.mark.attack(kind="audit")
def test_hardening_index_is_not_lower_than_before(reports):
    before, after = (index(report) for report in reports)
    assert after >= before


@pytest.mark.attack(kind="audit")
def test_each_remaining_warning_is_explained(reports):
    warnings = {line.partition("=")[2].split("|")[0] for line in reports[1] if line.startswith("warning[]=")}
    section = SECURITY.read_text().partition("\n## Lynis\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([A-Z]+-[0-9]+)` \|", section, re.MULTILINE)) == warnings
