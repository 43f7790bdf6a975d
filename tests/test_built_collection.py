"""Tests the collection as other projects use it: built, installed in a user's home directory, without ansible.cfg."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROLES, ROOT

NAME = "django_celery.stack"
BIN = Path(sys.executable).parent


class Installed:
    """The home of a user who has installed the collection, and an empty folder to work in."""

    def __init__(self, home):
        self.folder = home / "project"
        self.folder.mkdir()
        # No ANSIBLE_ variable is set, and the default path of collections is in this home directory.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        self.environment |= {"HOME": str(home), "NO_COLOR": "1"}
        self.collections = home / ".ansible/collections"
        self.run("ansible-galaxy", "collection", "build", ROOT, "--output-path", home)
        (self.archive,) = home.glob("*.tar.gz")
        self.run("ansible-galaxy", "collection", "install", "--no-deps", self.archive, "-p", self.collections)

    def run(self, program, *arguments):
        command = [BIN / program, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ERROR" not in done.stderr, done.stderr
        return done.stdout

    def doc(self, *arguments):
        return json.loads(self.run("ansible-doc", "--json", *arguments))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("home"))


def specs(role):
    return yaml.safe_load((ROOT / "roles" / role / "meta/argument_specs.yml").read_text())["argument_specs"]


def documented(kind):
    """The documentation of all modules, or of all plugins of one type, as the repository contains it."""
    sources = {path.stem: path.read_text() for path in (ROOT / "plugins" / kind).glob("*.py")}
    return {
        f"{NAME}.{name}": yaml.safe_load(text.split('DOCUMENTATION = r"""')[1].split('"""')[0]) for name, text in sources.items()
    }


def test_the_archive_has_no_tests_and_no_tools(installed):
    files = json.loads((installed.collections / "ansible_collections/django_celery/stack/FILES.json").read_text())["files"]
    assert {entry["name"].split("/")[0] for entry in files} == {
        *(".", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "meta", "requirements.yml", "ansible.cfg"),
        *("roles", "plugins", "playbooks", "site.yml", "inventories", "app"),
    }
    assert [entry["name"] for entry in files if "/." in entry["name"] or entry["name"].endswith("-secrets.yml")] == []


def test_ansible_doc_lists_every_role_with_its_short_descriptions(installed):
    listed = installed.doc("-t", "role", "--list", NAME)
    assert {name: role["entry_points"] for name, role in listed.items()} == {
        f"{NAME}.{role}": {entry: spec["short_description"] for entry, spec in specs(role).items()} for role in ROLES
    }
    # The output for a person, which also lists the roles of other collections.
    text = installed.run("ansible-doc", "-t", "role", "--list")
    assert [role for role in ROLES if f"{NAME}.{role}:" not in text] == []


def test_ansible_doc_shows_every_variable_of_every_role(installed):
    names = [f"{NAME}.{role}" for role in ROLES]
    shown = installed.doc("-t", "role", *names)
    for role in ROLES:
        found = {entry: set(spec["options"]) for entry, spec in shown[f"{NAME}.{role}"]["entry_points"].items()}
        assert found == {entry: set(spec["options"]) for entry, spec in specs(role).items()}, role
    text = installed.run("ansible-doc", "-t", "role", *names)
    assert [name for role in ROLES for name in specs(role)["main"]["options"] if name not in text] == []


@pytest.mark.parametrize(("kind", "folder"), [("module", "modules"), ("lookup", "lookup")])
def test_ansible_doc_shows_every_module_and_lookup(installed, kind, folder):
    written = documented(folder)
    assert len(written) > 2
    listed = installed.doc("-t", kind, "--list", NAME)
    assert listed == {name: text["short_description"] for name, text in written.items()}
    shown = installed.doc("-t", kind, *written)
    assert {name: set(entry["doc"]["options"]) for name, entry in shown.items()} == {
        name: set(text["options"]) for name, text in written.items()
    }
    text = installed.run("ansible-doc", "-t", kind, *written)
    assert [option for entry in written.values() for option in entry["options"] if option not in text] == []
