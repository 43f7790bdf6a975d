"""Searches for every secret of the environment: on the host, in the controller's output, and in backups."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path
from urllib.parse import quote

import pytest

SEARCH = Path(__file__).parents[1] / "files/search.yml"
# The secrets that each process of the application needs.
APPLICATION = {"secret_django_key", "secret_app_metrics_token", "secret_postgresql_app_password"}
# The files that may contain a secret: which secrets, and the users who may read them besides root.
PERMITTED = [
    (r"/etc/mailroom/environments/\w+", "root", "0640", APPLICATION),
    (r"/etc/mailroom/environments/\w+\.web", "root", "0600", {"secret_rabbitmq_app_password"}),
    (r"/etc/mailroom/environments/\w+\.worker", "root", "0600", {"secret_rabbitmq_worker_password"}),
    (r"/etc/mailroom/environments/\w+\.beat", "root", "0600", {"secret_rabbitmq_beat_password"}),
    (r"/etc/mailroom/flower\.environment", "root", "0600|0640", None),
    (r"/var/lib/rabbitmq/\.erlang\.cookie", "rabbitmq", "0400|0600", {"secret_rabbitmq_erlang_cookie"}),
]
# Processes have their secrets in their environment, which only their own user and root can read.
PROCESSES = {
    "mailroom": APPLICATION | {f"secret_rabbitmq_{kind}_password" for kind in ("app", "worker", "beat")},
    "mailroom-flower": {"secret_rabbitmq_flower_password", "secret_flower_password", "secret_flower_cookie"},
}


@pytest.fixture
def search(run_playbook):
    """Returns the hits on the host that no rule permits."""

    def run(**more):
        done = run_playbook(SEARCH, search_more=more)
        assert done.returncode == 0, done.stdout + done.stderr
        text = re.search(r'"msg": "HITS (\[.*\])"', done.stdout)[1]
        hits = json.loads(json.loads(f'"{text}"'))
        return [hit for hit in hits if not permitted(*hit)]

    return run


def permitted(place, name, mode, owner):
    if place.startswith("environ of "):
        return name in PROCESSES.get(owner, ())
    return any(
        re.fullmatch(path, place) and owner == own and re.fullmatch(modes, mode) and (names is None or name in names)
        for path, own, modes, names in PERMITTED
    )


def canary():
    return "Canary" + secrets.token_hex(12)


@pytest.mark.attack(kind="secrets on the host")
@pytest.mark.parametrize(
    ("leak", "place"),
    [
        pytest.param("echo {} >/srv/leak", "/srv/leak", id="file"),
        pytest.param("echo 'x{}y' | base64 -w 0 >/srv/leak", "/srv/leak", id="base64"),
        pytest.param("logger -- {}", "journal", id="journal"),
        pytest.param("systemd-run --unit=leak sleep {}d 1000", "cmdline of sleep", id="command line"),
        pytest.param("systemd-run --unit=leak --setenv=A={} sleep 1000", "environ of sleep", id="environment"),
        pytest.param("systemd-run --unit=leak --setenv=A={} sleep 1000", "units", id="unit"),
    ],
)
def test_search_finds_a_planted_secret(search, root, leak, place):
    value = "7" * 20 if "sleep {}d" in leak else canary()
    root(leak.format(value))
    try:
        hits = search(planted=value)
    finally:
        root("rm -f /srv/leak; systemctl stop leak; systemctl reset-failed leak; journalctl --rotate; journalctl --vacuum-time=1s")
    assert place in [found for found, name, *_ in hits if name == "planted"]


@pytest.mark.attack(kind="secrets on the host")
def test_secrets_are_only_in_their_files(search):
    assert search() == []


SERVICES = {"web": "app", "relay": "app", "worker@mail": "worker", "worker@maintenance": "worker", "beat": "beat"}


@pytest.mark.attack(kind="secrets on the host")
@pytest.mark.parametrize("service", SERVICES)
def test_service_has_only_the_password_of_its_own_broker_user(root, variables, service):
    pid = root(f"systemctl show --property=MainPID --value mailroom-{service}").stdout.strip()
    environ = root(f"cat /proc/{pid}/environ").stdout
    kinds = [
        kind
        for kind in ("app", "worker", "beat", "flower", "monitoring")
        if variables[f"secret_rabbitmq_{kind}_password"] in environ
    ]
    assert kinds == [SERVICES[service]]


def leaks(output, values):
    """The names of the values that an output contains, plain or encoded for a URL."""
    return [name for name, value in values.items() if value in output or quote(value, safe="") in output]


@pytest.fixture
def quiet(run_playbook, environment_secrets):
    """Runs a playbook with -vvv and --diff, and requires that no secret is printed."""

    def run(playbook, *arguments, **variables):
        done = run_playbook(playbook, "-vvv", "--diff", *arguments, **variables)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        assert leaks(done.stdout + done.stderr, environment_secrets) == []

    return run


@pytest.mark.attack(kind="secrets in the output")
@pytest.mark.parametrize("name", ["backup_postgresql", "backup_rabbitmq"])
def test_backup_prints_no_secret_and_is_private(quiet, tmp_path, name):
    quiet(f"playbooks/ops/{name}.yml", backup_directory=str(tmp_path / "backup"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [path for path in [*files, tmp_path / "backup"] if path.stat().st_mode & 0o077] == []


@pytest.mark.attack(kind="secrets in the output")
def test_secrets_that_exist_are_neither_printed_nor_changed(quiet):
    file = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "inventory/group_vars/all/91-secrets.yml")
    before = file.read_bytes()
    quiet("playbooks/ops/create_secrets.yml")
    assert file.read_bytes() == before
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.attack(kind="secrets in the output")
def test_whole_site_prints_no_secret(quiet, root):
    # Both runs show the difference of these files.
    root("rm /etc/mailroom/flower.environment /etc/rabbitmq/definitions.json")
    quiet("site.yml", "--check")
    quiet("site.yml")
