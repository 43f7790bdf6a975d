"""What inventories/common/wiring.yml makes of an inventory with many hosts."""

from __future__ import annotations

import json

from helpers import common_variables, playbook

WORKERS = [f"worker{number}" for number in range(1, 7)]
LOOK = {"postgresql_clients": "{{ postgresql_clients }}", "firewall_rules": "{{ firewall_rules }}"}


def wired(folder, host, seed):
    play = [{"hosts": host, "gather_facts": False, "tasks": [{"debug": {"msg": LOOK}}]}]
    (folder / "play.json").write_text(json.dumps(play))
    _, answer, output = playbook("-i", folder / "inventory", folder / "play.json", PYTHONHASHSEED=seed)
    (result,) = answer["plays"][0]["tasks"][0]["hosts"].values()
    assert not result.get("failed"), output
    return result["msg"]


def test_lists_of_hosts_have_the_same_order_in_each_run(tmp_path):
    """Ansible's filters for sets keep none; pg_hba.conf changed from run to run."""
    inventory = tmp_path / "inventory"
    common_variables(inventory)
    groups = {
        "broker": ["mq1"],
        "database": ["mq1"],
        "web": ["web1"],
        "workers": WORKERS,
        "app": ["web1", *WORKERS],
        "flower": ["mq1"],
    }
    hosts = {name: {"hosts": dict.fromkeys(members)} for name, members in groups.items()}
    (inventory / "hosts.json").write_text(json.dumps({"all": {"children": hosts}}))
    first, second = (wired(tmp_path, "mq1", seed) for seed in ("1", "2"))
    assert first == second
    assert [client["address"] for client in first["postgresql_clients"]] == ["127.0.0.1", *sorted(["web1", *WORKERS])]
