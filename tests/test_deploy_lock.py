"""Tests the lock of deployments with runs of Ansible that connect to this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
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
    assert f"Another run deploys this environment: {record['user']}@{record['controller']} since {record['since']}" in output
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
