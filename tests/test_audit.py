"""Tests the exceptions of `make audit`. pip-audit itself needs an advisory service, so only the workflow runs it."""

from __future__ import annotations

import datetime
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

SPEC = importlib.util.spec_from_file_location("audit", ROOT / "requirements/audit.py")
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)

TODAY = datetime.date(2026, 12, 31)
ENTRY = {"id": "PYSEC-2026-1", "package": "django", "until": TODAY, "reason": "The application does not use this function."}


def test_exceptions_of_this_repository_are_valid():
    entries = yaml.safe_load((ROOT / "requirements/exceptions.yml").read_text())
    audit.accepted(entries, datetime.date.min)
    text = "".join((ROOT / lock).read_text() for lock in audit.locks())
    assert [entry["id"] for entry in entries if not re.search(rf"^{re.escape(entry['package'])}==", text, re.MULTILINE)] == []


def test_exception_is_accepted_until_its_last_day():
    assert audit.accepted([ENTRY], TODAY) == ["PYSEC-2026-1"]
    with pytest.raises(audit.Wrong, match="The exception for PYSEC-2026-1 ended on 2026-12-31: update django, or review"):
        audit.accepted([ENTRY], TODAY + datetime.timedelta(days=1))


@pytest.mark.parametrize(
    "change", [{"reason": ""}, {"until": "soon"}, {"id": None}, {"because": "x"}], ids=lambda change: next(iter(change))
)
def test_wrong_exception_is_refused(change):
    with pytest.raises(audit.Wrong, match="Exception 1"):
        audit.accepted([ENTRY | change], TODAY)


def test_exceptions_must_be_a_list():
    with pytest.raises(audit.Wrong, match="not a list"):
        audit.accepted(None, TODAY)


def test_every_lock_is_checked_with_its_hashes():
    assert {str(lock) for lock in audit.locks()} >= {
        "app/requirements.txt",
        "requirements/controller.txt",
        "roles/flower/files/requirements.txt",
    }
    words = audit.command(Path("app/requirements.txt"), ["PYSEC-2026-1"])
    options = ["--strict", "--disable-pip", "--require-hashes"]
    assert words[1:] == [*options, "--requirement", "app/requirements.txt", "--ignore-vuln", "PYSEC-2026-1"]
