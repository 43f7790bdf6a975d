"""Tests that playbooks run from any folder without ansible.cfg, and that the built collection lacks the links that allow it."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, common_variables


def ansible_playbook(folder, *arguments):
    """Runs ansible-playbook without ansible.cfg and Ansible's environment variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    command = [Path(sys.executable).parent / "ansible-playbook", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("playbook", [ROOT / "playbooks/validate.yml", ROOT / "site.yml"], ids=lambda path: path.name)
def test_first_play_runs_from_an_empty_folder(tmp_path, playbook):
    inventory = tmp_path / "inventory"
    common_variables(inventory)
    groups = ("broker", "database", "flower", "web", "workers", "app")
    (inventory / "hosts.yml").write_text(yaml.safe_dump({group: {"hosts": {"host.invalid": None}} for group in groups}))
    folder = tmp_path / "empty"
    folder.mkdir()
    done = ansible_playbook(folder, "-i", inventory, playbook)
    # After the first play, site.yml connects to the host, which does not exist.
    assert done.returncode == (2 if playbook.name == "site.yml" else 0), done.stdout + done.stderr
    assert "Flower's variables" in done.stdout
    if playbook.name == "site.yml":
        assert "1 problem:\n  host.invalid: Ansible can't connect: " in done.stdout + done.stderr
    else:
        assert " failed=0 " in done.stdout


# Ansible searches the folders of all playbooks on a command line, so each folder has its own command.
@pytest.mark.parametrize("folder", [".", "playbooks", "playbooks/ops"])
def test_every_playbook_finds_the_collection_from_an_empty_folder(tmp_path, folder):
    """Ansible looks up roles when it loads a playbook."""
    playbooks = sorted((ROOT / folder).glob("site.yml" if folder == "." else "*.yml"))
    assert playbooks
    (tmp_path / "hosts.yml").write_text("all: {hosts: {host.invalid: }}\n")
    done = ansible_playbook(tmp_path, "-i", "hosts.yml", "--syntax-check", *playbooks)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_molecule_uses_the_configuration_file():
    folders = ("playbooks", "roles", "plugins", "inventories", "testbed")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".yml", ".py", ".j2")
    ]
    assert len(files) > 100
    assert [path for path in files if "ansible_config_file" in path.read_text()] == []


@pytest.mark.parametrize("link", ["collections", "playbooks/collections", "playbooks/ops/collections"])
def test_links_are_relative_and_excluded_from_the_build(link):
    path = ROOT / link
    assert (path / "ansible_collections/django_celery/stack").resolve() == ROOT
    if path.is_symlink():
        assert not path.readlink().is_absolute()
    ignored = yaml.safe_load((ROOT / "galaxy.yml").read_text())["build_ignore"]
    assert any(fnmatch.fnmatch(link, pattern) for pattern in ignored)
