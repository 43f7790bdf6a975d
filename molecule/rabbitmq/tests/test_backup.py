"""Restores the backup of a broker onto a new host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

BARE = (
    "systemctl stop rabbitmq-server && DEBIAN_FRONTEND=noninteractive apt-get -qq purge --yes rabbitmq-server >/dev/null 2>&1; "
    "rm -rf /etc/rabbitmq /var/lib/rabbitmq /var/log/rabbitmq && ! command -v rabbitmqctl"
)
BY_HAND = {
    "vhosts": [{"name": "kept/1", "metadata": {"description": "by hand", "default_queue_type": "classic"}}],
    "permissions": [{"user": "keeper", "vhost": "kept/1", "configure": "", "write": ".*", "read": ""}],
    "topic_permissions": [{"user": "keeper", "vhost": "kept/1", "exchange": "letters", "write": "^a", "read": ""}],
    "parameters": [{"component": "vhost-limits", "vhost": "kept/1", "name": "limits", "value": {"max-queues": 4}}],
    "policies": [
        {"vhost": "kept/1", "name": "p", "pattern": "", "apply-to": "all", "priority": 2, "definition": {"max-length": 5}}
    ],
    "exchanges": [{"vhost": "kept/1", "name": "letters", "type": "topic", "durable": True, "auto_delete": False, "arguments": {}}],
    "queues": [{"vhost": "kept/1", "name": "q", "durable": True, "auto_delete": False, "arguments": {"x-queue-type": "classic"}}],
    "bindings": [
        {
            "vhost": "kept/1",
            "source": "letters",
            "destination": "q",
            "destination_type": "queue",
            "routing_key": "a.#",
            "arguments": {},
        }
    ],
}
# Changes that the role does not make: an additional file, and a line in one of the role's files.
CONFIGURED_BY_HAND = (
    "echo 'heartbeat = 77' >> /etc/rabbitmq/rabbitmq.conf && install -D --mode 0640 --group rabbitmq /dev/null "
    "/etc/rabbitmq/conf.d/empty.conf && systemctl restart rabbitmq-server"
)
FILES = "cd /etc/rabbitmq && find . -type f -exec sha256sum {} + | sort && find . -printf '%p %u:%g %m\n' | sort"
# Keys that describe the broker and the export.
OF_THE_NODE = ("original_cluster_name", "explanation")


@pytest.fixture
def play(tmp_path, variables):
    def run(playbook, *arguments):
        done = subprocess.run(
            [
                Path(sys.executable).parent / "ansible-playbook", playbook,
                "--limit", variables["inventory_hostname"], "--diff", "--extra-vars", f"backup_directory={tmp_path}", *arguments,
            ],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


def comparable(definitions):
    """The definitions without their order and without the values that differ between nodes."""
    return {
        kind: sorted(json.dumps(entry, sort_keys=True) for entry in value if entry.get("name") != "internal_cluster_id")
        if isinstance(value, list)
        else value
        for kind, value in definitions.items()
        if kind not in OF_THE_NODE
    }


def test_backup_is_restored_onto_a_new_host(api, play, host, variables, tmp_path):
    if variables["testbed_platform"] != "debian13":
        pytest.skip("The test purges Debian's package; the playbooks do not depend on the platform.")
    api("users/keeper", "PUT", json={"password": "Secret-of-the-keeper", "tags": "management"})
    api("definitions", "POST", json=BY_HAND)
    before = comparable(api("definitions"))
    with host.sudo():
        host.check_output(CONFIGURED_BY_HAND)
        configuration = host.check_output(FILES)
    code, output = play("playbooks/ops/backup_rabbitmq.yml")
    assert code == 0, output
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert found == {"definitions.json": 0o600, "rabbitmq.tar.gz": 0o600}
    # The playbook printed no hash and no password.
    assert not [
        user["name"] for user in json.loads((tmp_path / "definitions.json").read_text())["users"] if user["password_hash"] in output
    ]

    with host.sudo():
        host.check_output(BARE)
    code, output = play("playbooks/broker.yml")
    assert code == 0, output
    assert comparable(api("definitions")) != before
    code, output = play("playbooks/ops/restore_rabbitmq.yml")
    assert code != 0
    assert "-e confirm=yes" in output
    code, output = play("playbooks/ops/restore_rabbitmq.yml", "--extra-vars", "confirm=yes")
    assert code == 0, output
    assert comparable(api("definitions")) == before
    # The restored hash matches the password.
    assert api("whoami", auth=("keeper", "Secret-of-the-keeper"))["name"] == "keeper"
    with host.sudo():
        assert host.check_output(FILES) == configuration
        # The broker was restarted with the configuration.
        assert "77" in host.check_output("rabbitmqctl --quiet eval 'application:get_env(rabbit, heartbeat).'")
    api("vhosts/kept%2F1", "DELETE")
    api("users/keeper", "DELETE")
    with host.sudo():
        host.check_output("rm -r /etc/rabbitmq/conf.d")
    code, output = play("playbooks/broker.yml")
    assert code == 0, output


def test_restore_reports_differences_from_the_backup(api, play, tmp_path):
    """The import does not change a queue that exists with other arguments."""
    code, output = play("playbooks/ops/backup_rabbitmq.yml")
    assert code == 0, output
    kept = json.loads((tmp_path / "definitions.json").read_text())
    kept["queues"] = [
        {"vhost": "mailroom", "name": "mail.q", "durable": True, "auto_delete": False, "arguments": {"x-queue-type": "stream"}}
    ]
    (tmp_path / "definitions.json").write_text(json.dumps(kept))
    api("queues/mailroom/mail.q", "PUT", json={"durable": True, "arguments": {"x-queue-type": "classic"}})
    code, output = play("playbooks/ops/restore_rabbitmq.yml", "--extra-vars", "confirm=yes")
    api("queues/mailroom/mail.q", "DELETE")
    assert code != 0
    assert "still differs from the backup: queues mail.q in mailroom." in output


def test_restore_of_a_broken_backup_does_not_change_the_broker(api, play, host, tmp_path):
    code, output = play("playbooks/ops/backup_rabbitmq.yml")
    assert code == 0, output
    kept = json.loads((tmp_path / "definitions.json").read_text())
    (tmp_path / "definitions.json").write_text(json.dumps({**kept, "rabbitmq_version": "9.9.1"}))
    with host.sudo():
        before = comparable(api("definitions")), host.check_output(FILES)
        code, output = play("playbooks/ops/restore_rabbitmq.yml", "--extra-vars", "confirm=yes")
        assert code != 0
        assert "definitions.json can't be restored: it is from RabbitMQ 9.9.1, which is newer than" in output
        assert (comparable(api("definitions")), host.check_output(FILES)) == before
