"""Compares the Homebrew stand-in with records of the real Homebrew."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from importlib.machinery import SourceFileLoader

import pytest
from helpers import ROOT, executable

BREW = ROOT / "testbed/images/macos/stand-in/rootfs/opt/homebrew/bin/brew"

# Records of the real brew, each below the URL of its source; only long values are shortened.
#
# `brew info --json=v2 wget` on an Apple silicon Mac, of December 2024:
# https://github.com/wxnacy/homebrew-rs/blob/43957b174b913e0c54511c50964e3ee5c4946520/examples/data/wget.json
INFO = """
{"formulae": [{
  "name": "wget", "full_name": "wget", "tap": "homebrew/core", "oldnames": [], "aliases": [], "versioned_formulae": [],
  "desc": "Internet file retriever", "license": "GPL-3.0-or-later", "homepage": "https://www.gnu.org/software/wget/",
  "versions": {"stable": "1.25.0", "head": "HEAD", "bottle": true}, "urls": {}, "revision": 0, "version_scheme": 0, "bottle": {},
  "pour_bottle_only_if": null, "keg_only": false, "keg_only_reason": null, "options": [], "build_dependencies": ["pkgconf"],
  "dependencies": ["libidn2", "openssl@3", "gettext", "libunistring"], "test_dependencies": [], "recommended_dependencies": [],
  "optional_dependencies": [], "uses_from_macos": ["zlib"], "uses_from_macos_bounds": [{}], "requirements": [],
  "conflicts_with": [], "conflicts_with_reasons": [], "link_overwrite": [], "caveats": null,
  "installed": [{
    "version": "1.25.0", "used_options": [], "built_as_bottle": true, "poured_from_bottle": true, "time": 1734795904,
    "runtime_dependencies": [], "installed_as_dependency": false, "installed_on_request": true
  }],
  "linked_keg": "1.25.0", "pinned": false, "outdated": false, "deprecated": false, "deprecation_date": null,
  "deprecation_reason": null, "deprecation_replacement": null, "disabled": false, "disable_date": null, "disable_reason": null,
  "disable_replacement": null, "post_install_defined": false, "service": null,
  "tap_git_head": "616640cd0d28150fbab60d51bc2048a1cd576b46", "ruby_source_path": "Formula/w/wget.rb", "ruby_source_checksum": {},
  "head_dependencies": {}
}], "casks": []}
"""
# Any command as root, with exit code 1: https://github.com/geerlingguy/ansible-role-homebrew/issues/106
AS_ROOT = """\
Error: Running Homebrew as root is extremely dangerous and no longer supported.
As Homebrew does not drop privileges on installation you would be giving all
build scripts full access to your system."""
# `brew install` of an installed formula: https://github.com/asdf-community/asdf-php/pull/91
INSTALLED = """\
Warning: gmp 6.2.1 is already installed and up-to-date.
To reinstall 6.2.1, run:
  brew reinstall gmp
"""
# `brew info` of an unknown formula: https://github.com/robertgzr/homebrew-tap/pull/15
UNKNOWN = 'Error: No available formula with the name "iosevka".'

# This script replaces the formula's program.
INITDB = """
import os, sys
os.makedirs(sys.argv[-1])
open(f"{sys.argv[-1]}/PG_VERSION", "a").write(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def brew(tmp_path, monkeypatch):
    """The program as a module with a temporary prefix."""
    monkeypatch.setenv("HOMEBREW_PREFIX", str(tmp_path))
    loader = SourceFileLoader("brew", str(BREW))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("brew", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr("os.geteuid", lambda: 501)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["brew", *words])
        module.main()

    run.module = module
    return run


def differences(value, recorded, where="formulae"):
    """The paths at which a result has a key that is not in the record, or a value of another type. Ignores null and empty lists."""
    if isinstance(value, dict) and isinstance(recorded, dict):
        unknown = [f"{where}.{key}" for key in value if key not in recorded]
        known = [key for key in value if key in recorded]
        return unknown + [line for key in known for line in differences(value[key], recorded[key], f"{where}.{key}")]
    if isinstance(value, list) and isinstance(recorded, list):
        return [line for each in value[:1] for other in recorded[:1] for line in differences(each, other, f"{where}[]")]
    return [] if None in (value, recorded) or type(value) is type(recorded) else [where]


def test_root_is_refused(brew, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(SystemExit) as caught:
        brew("info", "--json=v2", "python@3.13")
    # SystemExit with a string writes it to standard error and exits with 1.
    assert caught.value.code == AS_ROOT


def test_info_before_and_after_an_installation(brew, capsys):
    recorded = json.loads(INFO)
    brew("info", "--json=v2", "--formula", "python@3.13")
    answer = json.loads(capsys.readouterr().out)
    assert differences(answer, recorded) == []
    (before,) = answer["formulae"]
    assert (before["installed"], before["linked_keg"]) == ([], None)
    brew("install", "python3")
    capsys.readouterr()
    brew("info", "--json=v2", "python3", "--formula")
    answer = json.loads(capsys.readouterr().out)
    assert differences(answer, recorded) == []
    (after,), (wget,) = answer["formulae"], recorded["formulae"]
    for formula in (after, wget):
        assert formula["linked_keg"] == formula["installed"][0]["version"] == formula["versions"]["stable"]


def test_keg_is_linked_into_the_prefix(brew, tmp_path):
    """docs.brew.sh, "Formula Cookbook": Cellar, opt, and links of the programs into the prefix."""
    brew("install", "python@3.13")
    (keg,) = (tmp_path / "Cellar/python@3.13").iterdir()
    assert (tmp_path / "opt/python@3.13").resolve() == keg
    assert (tmp_path / "bin/python3.13").readlink().parts[:2] == ("..", "Cellar")


def test_keg_only_formula_is_linked_by_its_version_only(brew, tmp_path, monkeypatch, capsys):
    """Formula/p/postgresql@17.rb in homebrew-core: keg_only and post_install."""
    name = "postgresql@17"
    keg = tmp_path / "Cellar" / name / "17.6"
    monkeypatch.setattr(brew.module, "stable", lambda _: keg.name)
    monkeypatch.setattr(brew.module, "pour", lambda *_: executable(keg / "lib/postgresql/17/bin/initdb", INITDB))
    brew("install", name)
    # This is the state after `brew uninstall`, which keeps var.
    shutil.rmtree(keg)
    brew("install", name)
    capsys.readouterr()
    brew("info", "--json=v2", "--formula", name)
    answer = json.loads(capsys.readouterr().out)
    assert differences(answer, json.loads(INFO)) == []
    (formula,) = answer["formulae"]
    assert (formula["keg_only"], formula["linked_keg"], formula["installed"][0]["version"]) == (True, None, keg.name)
    assert (tmp_path / "opt" / name).resolve() == keg
    assert (tmp_path / "bin/initdb-17").resolve() == keg / "lib/postgresql/17/bin/initdb"
    assert not (tmp_path / "bin/initdb").exists()
    # The formula creates its cluster only once.
    cluster = tmp_path / "var" / name
    assert (cluster / "PG_VERSION").read_text() == f"--locale=C -E UTF-8 {cluster}"


def test_installed_formula_is_not_changed(brew, tmp_path, capsys):
    brew("install", "python@3.13")
    (keg,) = (tmp_path / "Cellar/python@3.13").iterdir()
    capsys.readouterr()
    brew("install", "python@3.13")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == INSTALLED.replace("gmp", "python@3.13").replace("6.2.1", keg.name)


def test_unknown_formula_is_refused(brew):
    with pytest.raises(SystemExit) as caught:
        brew("info", "--json=v2", "iosevka")
    assert caught.value.code == UNKNOWN


def test_stand_in_stays_small():
    """The stand-in must stay a set of shims of about 420 lines."""
    root = ROOT / "testbed/images/macos/stand-in/rootfs"
    programs = [path for path in root.rglob("*") if path.is_file() and (path.suffix == ".py" or path.read_bytes()[:2] == b"#!")]
    assert len(programs) == 8
    assert sum(1 for path in programs for line in path.read_text().splitlines() if line.strip()) <= 420
