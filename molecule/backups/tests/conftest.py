"""Fixtures for playbooks that run on all hosts of the scenario."""

from __future__ import annotations

import pytest


@pytest.fixture
def play(run_playbook):
    """Runs a playbook on all hosts; returns its output. Requires success unless the test expects a failure."""

    def run(name, fails=False, **variables):
        done = run_playbook(f"playbooks/{name}.yml", "--limit", "all", **variables)
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    return run
