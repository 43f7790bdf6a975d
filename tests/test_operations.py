"""Tests that the playbooks for operations refuse wrong hosts before they change anything."""

from __future__ import annotations

import json

import pytest
from helpers import common_variables, playbook


@pytest.fixture
def inventory(tmp_path):
    """An inventory with hosts that do not exist. A task that connects to one of them fails."""
    common_variables(tmp_path)

    def write(**groups):
        hosts = {group: {"hosts": dict.fromkeys(names)} for group, names in groups.items()}
        application = {"children": {group: hosts.pop(group) for group in ("web", "workers")}}
        connection = {"ansible_host": "127.0.0.1", "ansible_port": 1, "wiring_repository": str(tmp_path)}
        text = {"all": {"vars": connection, "children": {"app": application, **hosts}}}
        (tmp_path / "hosts.yml").write_text(json.dumps(text))
        return tmp_path

    return write


def refusal(found):
    code, result, output = found
    assert code != 0, output
    texts = [
        host["msg"]
        for play in result["plays"]
        for task in play["tasks"]
        for host in task["hosts"].values()
        if host.get("failed") and "msg" in host
    ]
    assert texts, output
    return texts[0]


GROUPS = {"broker": ["mq1"], "web": ["web1", "web2"], "workers": ["web1"]}


@pytest.mark.parametrize(
    ("groups", "extra", "text"),
    [
        (GROUPS, {}, "host is not set; set it to the host to drain, such as -e host=web1."),
        (GROUPS, {"host": "mq1"}, "host is mq1; allowed: a host of the group app (web1, web2)."),
        (
            GROUPS,
            {"host": "web1"},
            "web1 is the only host of workers, so draining it would stop this service. Add a host, or set drain_last=true.",
        ),
        ({**GROUPS, "web": ["web1"]}, {"host": "web1"}, "web1 is the only host of web and workers, so draining it would stop"),
    ],
)
def test_drain_refuses_a_host(inventory, groups, extra, text):
    words = ["-i", inventory(**groups), "playbooks/ops/drain.yml", "--extra-vars", json.dumps(extra)]
    assert refusal(playbook(*words)).startswith(text)


@pytest.mark.parametrize(
    ("groups", "extra", "text"),
    [
        (GROUPS, {}, "host is not set; set it to the host to remove, such as -e host=web1."),
        (
            {**GROUPS, "flower": ["web2"], "proxy": ["web2"]},
            {"host": "web2"},
            "web2 is also in proxy. Move these groups to other hosts first.",
        ),
        (GROUPS, {"host": "web1"}, "web1 is the first host of app or of workers, so it migrates the database or runs beat."),
    ],
)
def test_host_that_the_environment_needs_is_not_removed(inventory, groups, extra, text):
    words = ["-i", inventory(**groups), "playbooks/ops/remove_host.yml", "--extra-vars", json.dumps({**extra, "confirm": "yes"})]
    assert refusal(playbook(*words)).startswith(text)


@pytest.mark.parametrize(("extra", "value"), [({}, "not set"), ({"promote": "web1"}, "web1")])
def test_promotion_needs_the_name_of_a_standby(inventory, extra, value):
    folder = inventory(**GROUPS, database=["db1", "db2"])
    words = ["-i", folder, "playbooks/ops/promote_postgresql.yml", "--extra-vars", json.dumps(extra)]
    assert refusal(playbook(*words)) == f"promote is {value}; allowed: the name of a standby (db2)."


def test_uninstall_requires_confirmation(inventory):
    words = ["-i", inventory(**GROUPS), "playbooks/ops/uninstall.yml", "--limit", "web1", "--extra-vars", '{"confirm": "no"}']
    assert refusal(playbook(*words)) == "This stops mailroom on web1. To confirm, type yes, or add -e confirm=yes"


def test_removal_of_a_host_requires_confirmation(inventory):
    words = ["-i", inventory(**GROUPS), "playbooks/ops/remove_host.yml", "--extra-vars", '{"host": "web2"}']
    assert refusal(playbook(*words)) == "This stops mailroom on web2 and removes it from there. To confirm, add -e confirm=yes"
