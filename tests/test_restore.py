"""Tests the checks of a backup's files on the controller. A restore that passes them fails later, since its host does not exist."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import yaml
from ansible_collections.django_celery.stack.plugins.filter.rabbitmq_backup import (
    rabbitmq_configuration_error,
    rabbitmq_definitions_error,
)
from helpers import ROOT, common_variables, playbook

EXPORT = {"rabbitmq_version": "4.0.9", "users": [], "vhosts": [], "permissions": [], "global_parameters": [], "queues": []}


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inventory")
    common_variables(folder)
    groups = ("broker", "database", "web", "workers", "app")
    (folder / "hosts.yml").write_text(yaml.safe_dump({group: {"hosts": {"host.invalid": None}} for group in groups}))
    return folder


@pytest.fixture
def restore(inventory, tmp_path):
    """Runs a restore of the files in the test's folder; returns the messages of its failed tasks."""

    def run(name, **variables):
        extra = json.dumps({"confirm": "yes", "backup_directory": str(tmp_path), **variables})
        code, answer, output = playbook("-i", inventory, ROOT / f"playbooks/ops/restore_{name}.yml", "--extra-vars", extra)
        assert code != 0, output
        results = [task["hosts"].get("host.invalid", {}) for play in answer["plays"] for task in play["tasks"]]
        failed = [result for result in results if result.get("failed") or result.get("unreachable")]
        return " ".join(str(each) for result in failed for each in [result["msg"], *result.get("results", [])])

    return run


def archive(path, *names):
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            file.addfile(entry, io.BytesIO(b"text"))


def broker_backup(folder, definitions=None):
    (folder / "definitions.json").write_text(json.dumps(EXPORT) if definitions is None else definitions)
    archive(folder / "rabbitmq.tar.gz", "rabbitmq/rabbitmq.conf")


# Definitions


@pytest.mark.parametrize("version", ["4.0", "4.0.5", "4.1", "5.0.0"])
def test_broker_of_the_same_or_a_newer_series_can_import(version):
    assert rabbitmq_definitions_error(json.dumps(EXPORT), version) == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is not JSON"),
        (json.dumps(EXPORT)[:-1], "it is not JSON"),
        ("[]", "it is no export of a broker, which contains the lists users, vhosts, permissions, global_parameters"),
        (json.dumps({**EXPORT, "users": {}}), "it is no export of a broker"),
        (json.dumps({"users": []}), "it is no export of a broker"),
        (json.dumps({**EXPORT, "rabbitmq_version": None}), "its rabbitmq_version is not a version"),
        (json.dumps({**EXPORT, "rabbitmq_version": "four"}), "its rabbitmq_version is not a version"),
        (
            json.dumps({**EXPORT, "rabbitmq_version": "4.10.0"}),
            "it is from RabbitMQ 4.10.0, which is newer than 4.2.10 (rabbitmq_version)",
        ),
    ],
)
def test_other_definitions_are_refused(text, sentence):
    assert rabbitmq_definitions_error(text, "4.2.10").startswith(sentence)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["rabbitmq/rabbitmq.conf", "rabbitmq/conf.d/", "rabbitmq/..conf"], ""),
        ([], "it does not contain rabbitmq/rabbitmq.conf"),
        (["etc/rabbitmq/rabbitmq.conf"], "it does not contain rabbitmq/rabbitmq.conf"),
        (["rabbitmq/rabbitmq.conf", "passwd"], "it contains passwd, outside of /etc/rabbitmq"),
        (["rabbitmq/rabbitmq.conf", "rabbitmq/../passwd"], "it contains rabbitmq/../passwd, outside of /etc/rabbitmq"),
        (["rabbitmq/rabbitmq.conf", "/etc/passwd"], "it contains /etc/passwd, outside of /etc/rabbitmq"),
    ],
)
def test_archive_contains_only_the_brokers_configuration(names, sentence):
    assert rabbitmq_configuration_error(names) == sentence


# Playbooks


def test_complete_backup_of_a_broker_passes_the_checks(restore, tmp_path):
    broker_backup(tmp_path)
    assert "host.invalid" in restore("rabbitmq")


@pytest.mark.parametrize("name", ["definitions.json", "rabbitmq.tar.gz"])
def test_restore_of_a_broker_requires_both_files(restore, tmp_path, name):
    broker_backup(tmp_path)
    (tmp_path / name).unlink()
    assert f"{tmp_path}/{name} does not exist. Create it with a backup." in restore("rabbitmq")


def test_restore_refuses_definitions_that_are_not_json(restore, tmp_path):
    broker_backup(tmp_path, json.dumps(EXPORT)[:-1])
    assert restore("rabbitmq") == f"{tmp_path}/definitions.json can't be restored: it is not JSON."


def test_restore_refuses_definitions_of_a_newer_broker(restore, tmp_path):
    broker_backup(tmp_path, json.dumps({**EXPORT, "rabbitmq_version": "9.9.1"}))
    assert "definitions.json can't be restored: it is from RabbitMQ 9.9.1, which is newer than 4.0 (" in restore("rabbitmq")


def test_restore_refuses_an_incomplete_archive(restore, tmp_path):
    broker_backup(tmp_path)
    file = tmp_path / "rabbitmq.tar.gz"
    file.write_bytes(file.read_bytes()[:-20])
    assert restore("rabbitmq") == f"{file} can't be restored: it is not a complete archive."


def test_restore_refuses_an_archive_with_other_files(restore, tmp_path):
    broker_backup(tmp_path)
    archive(tmp_path / "rabbitmq.tar.gz", "rabbitmq/rabbitmq.conf", "shadow")
    assert "rabbitmq.tar.gz can't be restored: it contains shadow, outside of /etc/rabbitmq." in restore("rabbitmq")


def test_restore_of_databases_requires_all_dumps(restore, tmp_path):
    assert f"{tmp_path}/mailroom.pgc does not exist. Create it with a backup." in restore("postgresql")
    (tmp_path / "mailroom.pgc").write_text("")
    assert "host.invalid" in restore("postgresql")


def test_restore_of_scheduled_backups_needs_a_repository(restore):
    assert "backups_repository is empty, so host.invalid has no scheduled backups." in restore("environment")


@pytest.mark.parametrize(
    ("role", "entry_point", "variable"),
    [
        ("postgresql", "backup", "postgresql_backup_directory"),
        ("postgresql", "restore", "postgresql_backup_directory"),
        ("rabbitmq", "backup", "rabbitmq_backup_directory"),
        ("rabbitmq", "restore", "rabbitmq_backup_directory"),
        ("backups", "fetch", "backups_restore_directory"),
    ],
)
def test_directory_is_required(inventory, tmp_path, role, entry_point, variable):
    tasks = [{"import_role": {"name": f"django_celery.stack.{role}", "tasks_from": entry_point}}]
    variables = {variable: ""}
    play = {"hosts": "all", "gather_facts": False, "vars": variables, "tasks": tasks}
    (tmp_path / "play.json").write_text(json.dumps([play]))
    _, _, output = playbook("-i", inventory, tmp_path / "play.json")
    assert f"Validating arguments against arg spec '{entry_point}' - " in output
    assert f"{variable} is empty; set it to a directory on the controller." in output
