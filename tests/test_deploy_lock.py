"""Tests the deployment lock with runs of Ansible that connect to this machine."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.django_celery.stack.plugins.action import deploy_lock
from ansible_collections.django_celery.stack.plugins.modules import deploy_lock as documentation
from helpers import ROOT


@pytest.fixture
def start(tmp_path):
    """Starts a run that takes the lock and then works for some seconds."""
    running = []

    def begin(seconds):
        tasks = [
            {"django_celery.stack.deploy_lock": {"path": str(tmp_path / "lock")}},
            {"ansible.builtin.command": {"argv": ["sleep", str(seconds)]}},
        ]
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
        (tmp_path / f"play{seconds}.json").write_text(json.dumps([play]))
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ansible-playbook"), tmp_path / f"play{seconds}.json"],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def wait_for_record(path, seconds=30):
    until = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until, "no run has the lock"
        time.sleep(0.1)
    return json.loads(path.read_text())


def test_second_run_is_refused_and_names_the_first(start, tmp_path):
    start(60)
    record = wait_for_record(tmp_path / "lock")
    output, _ = start(0).communicate(timeout=60)
    output = " ".join(output.split())
    assert f"Another run is deploying this environment: {record['user']}@{record['controller']} since {record['since']}" in output
    assert "failed=1" in output


def test_lock_ends_with_a_run_that_ends_or_is_killed(start, tmp_path):
    first = start(60)
    record = wait_for_record(tmp_path / "lock")
    first.kill()
    # The lock's processes close their copy of the output too.
    first.communicate(timeout=10)
    for _ in range(2):
        output, _ = start(0).communicate(timeout=60)
        assert "failed=0" in output, output
        assert json.loads((tmp_path / "lock").read_text())["run"] != record["run"]


def test_lock_that_no_run_can_get_is_an_error_with_its_cause(start, tmp_path):
    (tmp_path / "lock").mkdir()
    output, _ = start(0).communicate(timeout=60)
    assert "Can't take the lock" in output
    assert "Is a directory" in output


# Tests that call the plugin directly, without ansible-playbook


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The plugin with a connection to this machine. Its lock is released when the process `run` ends."""
    monkeypatch.setattr(ActionBase, "run", lambda self, tmp, task_vars: {})
    options = {"path": str(tmp_path / "lock")}
    monkeypatch.setattr(ActionBase, "validate_argument_spec", lambda self, spec: (None, options))
    plugin = object.__new__(deploy_lock.ActionModule)
    plugin._task = SimpleNamespace(check_mode=False)

    def execute(command):
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        return {"rc": done.returncode, "stdout": done.stdout, "stderr": done.stderr}

    plugin._low_level_execute_command = execute
    with subprocess.Popen(["sleep", "60"]) as run:
        monkeypatch.setattr(os, "getppid", lambda: run.pid)
        yield plugin
        run.kill()


def test_lock_is_not_taken_in_check_mode(plugin, tmp_path):
    plugin._task.check_mode = True
    assert plugin.run() == {"skipped": True}
    assert not (tmp_path / "lock").exists()


def test_result_has_the_record_in_the_lock_file(plugin, tmp_path):
    result = plugin.run()
    assert result["changed"] is False
    assert result["holder"] == json.loads((tmp_path / "lock").read_text())


def test_lock_of_another_process_is_refused_with_its_record(plugin, tmp_path):
    record = {"user": "alice", "controller": "laptop", "since": "yesterday", "run": "1"}
    with (tmp_path / "lock").open("w") as file:
        file.write(json.dumps(record))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AnsibleActionFail, match="alice@laptop since yesterday"):
            plugin.run()


def test_lock_file_that_is_a_directory_is_an_error(plugin, tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(AnsibleActionFail, match="Is a directory"):
        plugin.run()


class Ended(Exception):
    """Replaces the end of this process. The argument is the exit status."""


@pytest.mark.parametrize("rc, status", [(0, 0), (deploy_lock.REFUSED, deploy_lock.REFUSED), (255, 1)])
def test_holder_ends_with_the_status_of_the_program(plugin, monkeypatch, rc, status):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "setsid", lambda: None)
    monkeypatch.setattr(deploy_lock.signal, "signal", lambda number, action: None)
    monkeypatch.setattr(plugin, "end_with", lambda run: None)
    plugin._low_level_execute_command = lambda command: {"rc": rc, "stdout": "", "stderr": "the cause"}
    read, write = os.pipe()
    with pytest.raises(Ended, match=str(status)):
        plugin.hold(1, write, "/lock", "{}")
    os.close(write)
    assert os.read(read, 100) == b"the cause"


def test_holder_reports_a_broken_connection(plugin, monkeypatch):
    def end(code):
        raise Ended(code)

    def fail(command):
        raise OSError("no connection")

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "setsid", lambda: None)
    monkeypatch.setattr(deploy_lock.signal, "signal", lambda number, action: None)
    monkeypatch.setattr(plugin, "end_with", lambda run: None)
    plugin._low_level_execute_command = fail
    read, write = os.pipe()
    with pytest.raises(Ended, match="1"):
        plugin.hold(1, write, "/lock", "{}")
    os.close(write)
    assert os.read(read, 100) == b"no connection"


def test_holder_ends_when_the_run_has_ended(plugin, monkeypatch):
    killed = []

    def kill_group(group, signal):
        killed.append((group, signal))
        raise Ended

    monkeypatch.setattr(os, "killpg", kill_group)
    monkeypatch.setattr(deploy_lock.time, "sleep", lambda seconds: None)
    answers = iter([None, ProcessLookupError()])

    def exists(process, signal):
        if error := next(answers):
            raise error

    monkeypatch.setattr(os, "kill", exists)
    with pytest.raises(Ended):
        plugin.end_with(1)
    monkeypatch.undo()
    assert killed == [(0, deploy_lock.signal.SIGKILL)]


def test_documentation_has_the_options_of_the_plugin(plugin, monkeypatch):
    specs = []
    monkeypatch.setattr(ActionBase, "validate_argument_spec", lambda self, spec: (specs.append(spec), {"path": ""}))
    plugin._task.check_mode = True
    plugin.run()
    documented = yaml.safe_load(documentation.DOCUMENTATION)["options"]
    assert {name: (spec["type"], spec["required"]) for name, spec in specs[0].items()} == {
        name: (option["type"], option["required"]) for name, option in documented.items()
    }


@pytest.mark.parametrize("name", ["rollback", "rotate_secrets", "upgrade_rabbitmq", "migrate_rabbitmq"])
def test_playbook_takes_the_lock_before_it_changes_a_host(name):
    plays = yaml.safe_load((ROOT / "playbooks" / "ops" / f"{name}.yml").read_text())
    first = next(play for play in plays if play.get("become", True))
    assert first.get("ansible.builtin.import_playbook") in ("../lock.yml", "../site.yml")


@pytest.mark.parametrize("name", ["restore_environment", "restore_postgresql"])
def test_restore_takes_the_lock_before_it_stops_the_application(name):
    plays = yaml.safe_load((ROOT / "playbooks" / "ops" / f"{name}.yml").read_text())
    stop = next(index for index, play in enumerate(plays) if play["name"] == "Stop the application")
    assert plays[stop - 1].get("ansible.builtin.import_playbook") == "../lock.yml"
