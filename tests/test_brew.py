"""The stand-in of Homebrew beside records of the real one."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader

import pytest
from helpers import ROOT

BREW = ROOT / "testbed/images/macos/stand-in/rootfs/opt/homebrew/bin/brew"

# Keys of a formula, and of what is installed of it, in `brew info --json=v2`: docs.brew.sh, "Querying Brew", and formulae.brew.sh.
FORMULA = {
    "name", "full_name", "tap", "oldnames", "aliases", "versioned_formulae", "desc", "license", "homepage", "versions", "urls",
    "revision", "version_scheme", "autobump", "bottle", "keg_only", "keg_only_reason", "options", "dependencies", "caveats",
    "installed", "linked_keg", "pinned", "outdated", "deprecated", "disabled", "service", "tap_git_head",
}  # fmt: skip
INSTALLED = {
    "version", "used_options", "built_as_bottle", "poured_from_bottle", "time", "runtime_dependencies", "installed_as_dependency",
    "installed_on_request",
}  # fmt: skip


@pytest.fixture
def brew(tmp_path, monkeypatch):
    """The program as a module, over a prefix of the test's own."""
    monkeypatch.setenv("HOMEBREW_PREFIX", str(tmp_path))
    loader = SourceFileLoader("brew", str(BREW))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("brew", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr("os.geteuid", lambda: 501)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["brew", *words])
        module.main()

    return run


def test_root_is_refused(brew, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(SystemExit, match=r"^Error: Running Homebrew as root is extremely dangerous and no longer supported"):
        brew("info", "--json=v2", "python@3.13")


def test_info_before_and_after_an_installation(brew, capsys):
    brew("info", "--json=v2", "--formula", "python@3.13")
    (before,) = json.loads(capsys.readouterr().out)["formulae"]
    assert (before["installed"], before["linked_keg"]) == ([], None)
    assert set(before) <= FORMULA
    brew("install", "python3")
    capsys.readouterr()
    brew("info", "--json=v2", "python3", "--formula")
    answer = json.loads(capsys.readouterr().out)
    (after,) = answer["formulae"]
    assert answer["casks"] == []
    assert after["linked_keg"] == after["installed"][0]["version"] == after["versions"]["stable"]
    assert set(after["installed"][0]) <= INSTALLED


def test_a_keg_is_linked_as_formulae_are(brew, tmp_path, capsys):
    """docs.brew.sh, "Formula Cookbook": Cellar, opt, and links of the programs into the prefix."""
    brew("install", "python@3.13")
    (keg,) = (tmp_path / "Cellar/python@3.13").iterdir()
    assert (tmp_path / "opt/python@3.13").resolve() == keg
    assert (tmp_path / "bin/python3.13").readlink().parts[:2] == ("..", "Cellar")
    brew("install", "python@3.13")
    assert capsys.readouterr().err.endswith(" is already installed and up-to-date.\n")


def test_an_unknown_formula_is_refused(brew):
    with pytest.raises(SystemExit, match='Error: No available formula with the name "nope"'):
        brew("info", "--json=v2", "nope")
