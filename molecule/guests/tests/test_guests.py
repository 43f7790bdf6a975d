"""Two applications from two inventories on one host. The inventory of the scenario owns the broker and the database."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import requests
import yaml

PROJECT = Path(__file__).resolve().parents[3]
OWNER = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "inventory")
GUEST = "postroom"
PORT = 8001


def play(*words, **environment):
    return subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", *words],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_FORCE_COLOR": "false", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    """The guest's inventory, with generated secrets."""
    folder = tmp_path_factory.mktemp("guest")
    everything = folder / "group_vars/all"
    everything.mkdir(parents=True)
    (folder / "host_vars").symlink_to(OWNER / "host_vars")
    (everything / "00-common").symlink_to(PROJECT / "inventories/common")
    (everything / "20-testbed.yml").symlink_to(PROJECT / "testbed/vars.yml")
    (everything / "21-mailroom.yml").symlink_to(PROJECT / "testbed/mailroom.yml")
    (everything / "90-testbed.yml").symlink_to(OWNER / "group_vars/all/90-testbed.yml")
    hosts = {"hosts": {"shared1": None}}
    groups = {"app": {"children": {"web": hosts, "workers": hosts}}, "flower": hosts}
    (folder / "hosts.json").write_text(json.dumps({"all": {"children": groups}}))
    (everything / "30-guest.yml").write_text(
        yaml.safe_dump(
            {
                "app_name": GUEST,
                "wiring_web_port": PORT,
                "django_web_listen": [f"0.0.0.0:{PORT}"],
                "flower_port": 5556,
                "app_broker_url": f"amqp://{GUEST}:{{{{ secret_rabbitmq_app_password }}}}@127.0.0.1:5672/{GUEST}",
                "flower_broker_url": f"amqp://{GUEST}-flower:{{{{ secret_rabbitmq_flower_password }}}}@127.0.0.1:5672/{GUEST}",
                "app_database_url": f"postgresql://{GUEST}:{{{{ secret_postgresql_app_password }}}}@127.0.0.1:5432/{GUEST}",
            }
        )
    )
    done = play("-i", folder, "playbooks/ops/create_secrets.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def secrets(inventory):
    return yaml.safe_load((inventory / "group_vars/all/91-secrets.yml").read_text())


@pytest.fixture(scope="module")
def runs(inventory, secrets, tmp_path_factory):
    """Returns two functions: one runs site.yml of the owner, which lists the guest, and the other runs site.yml of the guest."""
    guest = {
        "name": GUEST,
        "broker_password": secrets["secret_rabbitmq_app_password"],
        "flower_password": secrets["secret_rabbitmq_flower_password"],
        "database_password": secrets["secret_postgresql_app_password"],
        "policies": [{"name": "mail", "pattern": r"^mail\.v", "apply_to": "quorum_queues", "definition": {"delivery-limit": 8}}],
    }
    variables = tmp_path_factory.mktemp("owner") / "guests.json"
    variables.write_text(json.dumps({"wiring_guests": [guest]}))
    return (
        lambda: play("site.yml", "--extra-vars", f"@{variables}"),
        lambda: play("-i", inventory, "site.yml", ANSIBLE_INVENTORY=str(inventory)),
    )


@pytest.fixture(scope="module", autouse=True)
def deployed(runs):
    for run in runs:
        done = run()
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_second_run_of_either_inventory_changes_nothing(runs):
    for run in (*runs, *runs):
        done = run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.findall(r"^shared1 .*changed=(\d+)", done.stdout, re.MULTILINE) == ["0"], done.stdout


def test_the_administrator_of_the_owner_stays(api):
    assert api("whoami")["name"] == "admin"
    assert {entry["name"] for entry in api("vhosts")} >= {"mailroom", GUEST}


@pytest.mark.parametrize("port, file", [(8000, None), (PORT, "secrets")], ids=["owner", "guest"])
def test_each_application_sends_its_email(url, variables, secrets, inbox, eventually, port, file):
    key = (secrets if file else variables)["secret_app_api_key"]
    subject = f"test {uuid.uuid4()}"
    email = {"subject": subject, "text": "Hello.", "to": ["one@example.net"]}
    answer = requests.post(f"{url(port)}/api/emails", json=email, headers={"Authorization": f"Bearer {key}"}, timeout=10)
    assert answer.status_code == 202, answer.text
    assert eventually(lambda: subject in inbox())


def test_the_guest_has_no_permission_in_the_virtual_host_of_the_owner(api):
    assert {entry["vhost"] for entry in api(f"users/{GUEST}/permissions")} == {GUEST}
    assert {entry["vhost"] for entry in api(f"users/{GUEST}-flower/permissions")} == {GUEST}


@pytest.mark.parametrize("database, code", [("mailroom", 2), (GUEST, 0)])
def test_the_guest_connects_only_to_its_own_database(host, secrets, database, code):
    url = f"postgresql://{GUEST}:{secrets['secret_postgresql_app_password']}@127.0.0.1/{database}"
    with host.sudo():
        done = host.run(f"psql --no-psqlrc --command 'SELECT 1' {url}")
    assert done.rc == code, done.stderr
    assert code == 0 or "no pg_hba.conf entry" in done.stderr
