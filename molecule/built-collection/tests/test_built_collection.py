"""Tests the built collection in another project: an empty folder without ansible.cfg, with a separate inventory and variables."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
COOKIE, ADMINISTRATOR, SHOP = (secrets.token_hex(16) for _ in range(3))
PLAYBOOK = f"""\
- hosts: all
  become: true
  roles:
    - django_celery.stack.erlang
    - django_celery.stack.rabbitmq
  vars:
    rabbitmq_erlang_cookie: "{COOKIE}"
    rabbitmq_administrator_password: "{ADMINISTRATOR}"
    rabbitmq_users: [{{name: shop, password: "{SHOP}", tags: [management]}}]
"""


class Project:
    """A folder with a playbook, an inventory with one host, and a separate home directory in which the collection is installed."""

    def __init__(self, folder, connection):
        self.folder = folder
        # The environment has no ANSIBLE_ variables, although Molecule sets some. ~/.ansible/collections is the default path of
        # collections.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        self.environment["HOME"] = str(folder / "home")
        (folder / "playbook.yml").write_text(PLAYBOOK)
        (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": {"mq": connection}}}))

    def run(self, program, *arguments):
        command = [BIN / program, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self):
        self.run("ansible-galaxy", "collection", "build", PROJECT)
        (archive,) = self.folder.glob("*.tar.gz")
        self.run("ansible-galaxy", "collection", "install", "--no-deps", archive)

    def play(self):
        return self.run("ansible-playbook", "-i", "hosts.json", "playbook.yml", "--diff")


@pytest.fixture(scope="module")
def project(variables, tmp_path_factory):
    """The project after one run of its playbook."""
    connection = {name: value for name, value in variables.items() if name.startswith("ansible_")}
    project = Project(tmp_path_factory.mktemp("project"), connection)
    project.install()
    project.first = project.play()
    return project


def whoami(host, password):
    """The management API's response to the user from the playbook."""
    options = f"url_username=shop url_password={password} force_basic_auth=true status_code=200,401"
    return host.ansible("uri", f"url=http://127.0.0.1:15672/api/whoami {options}", check=False)


def test_the_roles_are_those_of_the_archive(project):
    shown = json.loads(project.run("ansible-doc", "--json", "-t", "role", "django_celery.stack.rabbitmq"))
    path = Path(shown["django_celery.stack.rabbitmq"]["path"])
    assert path == project.folder / "home/.ansible/collections/ansible_collections/django_celery/stack"


def test_the_broker_has_the_user_that_the_playbook_declares(host, project):
    assert "failed=0" in project.first
    answer = whoami(host, SHOP)
    assert answer["status"] == 200
    assert answer["json"] == answer["json"] | {"name": "shop", "tags": ["management"]}
    assert whoami(host, "wrong")["status"] == 401


def test_a_second_run_changes_nothing(project):
    second = project.play()
    assert "changed=0 " in second, second


def test_no_secret_is_printed(project):
    assert [word for word in (COOKIE, ADMINISTRATOR, SHOP) if word in project.first] == []
