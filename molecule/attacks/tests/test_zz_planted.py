"""A captured service plants code and links in every directory that it can write. Then an operator works on the host as root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PLANT = Path(__file__).parents[1] / "files/plant.py"
# A unit, and the user that its process has.
CAPTURED = [
    ("mailroom-web", "mailroom"),
    ("mailroom-relay", "mailroom"),
    ("mailroom-worker@mail", "mailroom"),
    ("mailroom-beat", "mailroom"),
    ("mailroom-flower", "mailroom-flower"),
    ("rabbitmq-server", "rabbitmq"),
    ("postgresql@17-main", "postgres"),
    ("nginx", "www-data"),
]
ACTS = ["site", "rollback", "backup_postgresql", "backup_rabbitmq", "second run"]


@pytest.fixture(scope="module")
def planted(host, inside):
    """The directories in which each service planted something."""
    with host.sudo():
        host.check_output("install -d -m 0755 /run/attack && rm -f /var/tmp/attack-ran*")
        host.check_output("install -m 0600 /dev/null /root/attack-target && echo secret >/root/attack-target")
        text = PLANT.read_text().replace("'", "'\\''")
        host.check_output(f"printf %s '{text}' >/run/attack/plant.py")
    found = {}
    for unit, user in CAPTURED:
        done = inside(unit, user, "sh -c 'cd / && python3 -I /run/attack/plant.py'")
        assert done.rc == 0, done.stderr
        found[unit] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def traces(host, planted):
    """What an act did to root's file, and the users that ran planted code."""

    def look():
        with host.sudo():
            state = host.check_output("stat --format='%U:%G %a' /root/attack-target; cat /root/attack-target")
            ran = host.check_output("find /var/tmp -name 'attack-ran-*' -printf '%f '; rm -f /var/tmp/attack-ran-*")
        return state.split(), ran.split()

    look()
    return look


UNTOUCHED = (["root:root", "600", "secret"], [])


@pytest.mark.attack(kind="planted files")
@pytest.mark.parametrize(("unit", "user"), CAPTURED)
def test_service_can_plant_only_in_its_own_directories(planted, unit, user):
    own = ("/var/lib/", "/run/", "/var/log/rabbitmq", "/var/log/postgresql", "/var/cache/nginx", "/opt/mailroom/shared")
    assert [directory for directory in planted[unit] if not directory.startswith(own)] == []
    assert [directory for directory in planted[unit] if directory in ("/var/lib", "/run")] == []


@pytest.mark.attack(kind="planted files")
@pytest.mark.parametrize("act", ACTS)
def test_operator_runs_no_planted_code_and_follows_no_planted_link(host, planted, traces, run_playbook, tmp_path, act):
    assert planted["mailroom-web"] and planted["rabbitmq-server"] and planted["postgresql@17-main"]
    playbook = {"site": "site.yml", "second run": "site.yml"}.get(act, f"playbooks/ops/{act}.yml")
    more = {"backup_directory": str(tmp_path)} if act.startswith("backup") else {}
    done = run_playbook(playbook, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert traces() == UNTOUCHED


def test_planted_code_works_where_it_is_read(host, planted, traces):
    """Otherwise the tests above could not fail."""
    with host.sudo():
        host.check_output("cd / && runuser -u postgres -- env HOME=/var/lib/postgresql python3 -c ''")
        host.check_output("cd /var/lib/postgresql && runuser -u postgres -- psql -Atc 'SELECT 1'")
    assert traces()[1] != []


@pytest.fixture(scope="module", autouse=True)
def removed(host):
    """Removes what was planted, also if a test fails."""
    yield
    with host.sudo():
        names = (
            "attack.pth usercustomize.py sitecustomize.py json.py .profile .psqlrc .erlang .gitconfig pip.conf uv.toml ansible.cfg"
        )
        for name in names.split():
            host.run(f"find /var/lib /run /var/log -xdev -name '{name}' -newer /run/attack/plant.py -delete")
        host.run("find /var/lib /run /var/log -xdev -lname /root/attack-target -delete")
        host.run("find /var/lib -name .erlang.cookie.attack -delete; rm -f /root/attack-target /var/tmp/attack-ran*")
