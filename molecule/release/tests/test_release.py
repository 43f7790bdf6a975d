"""Tests deployments and rollbacks on two web hosts behind a proxy, with the workers on another host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).resolve().parents[3]

# The application imports and passes its checks. Its web service answers each request of one host, or of all hosts, with an error.
UNHEALTHY = """
import socket
import sys

MIDDLEWARE.insert(0, "mailroom.settings.broken")


def broken(get_response):
    fails = "gunicorn" in sys.modules and socket.gethostname() in HOSTS
    return lambda request: 1 / 0 if fails else get_response(request)
"""
HOSTS = ("web1", "web2", "hub")
WEB_HOSTS = HOSTS[:2]


@pytest.fixture
def run(run_playbook):
    """Runs a playbook on all hosts; returns the finished process."""
    return lambda playbook, *arguments, **variables: run_playbook(playbook, "--limit", "all", *arguments, **variables)


@pytest.fixture
def state(on):
    """Returns the release, the environment and the start of the web service of a host."""
    look = (
        "readlink /opt/mailroom/current; cat /opt/mailroom/current/environment* | sha256sum;"
        " systemctl show --property ExecMainStartTimestampMonotonic --value mailroom-web.service"
    )
    return lambda name: on(name, look).split("\n")


@pytest.fixture
def log(on):
    """Returns the lines that the last runs added to the log of deployments of a host."""
    return lambda name: on(name, "cat /opt/mailroom/deployments.log").splitlines()


def flat(done):
    """The output without Ansible's line breaks."""
    return " ".join(done.stdout.split())


def test_deployment_and_rollback_drop_no_request(run, state, project, traffic):
    before = [state(name) for name in HOSTS]
    with traffic(80) as (durations, errors):
        done = run("playbooks/app.yml", django_source=project("mailroom/other.py", "# A release under load.\n"))
        assert done.returncode == 0, done.stdout
        deployed = [state(name) for name in HOSTS]
        done = run("playbooks/ops/rollback.yml")
        assert done.returncode == 0, done.stdout
    assert len({release for release, *_ in deployed}) == 1
    assert deployed[0][0] != before[0][0]
    assert [state(name)[0] for name in HOSTS] == [release for release, *_ in before]
    assert len(durations) > 100
    assert (errors, max(durations) < 5) == ([], True), sorted(durations)[-10:]


@pytest.mark.parametrize("host_name", WEB_HOSTS)
def test_unhealthy_release_is_switched_back_on_all_hosts_and_gets_no_request(run, state, project, traffic, host_name):
    before = [state(name) for name in HOSTS]
    source = project("mailroom/settings.py", UNHEALTHY.replace("HOSTS", repr([host_name])))
    with traffic(80) as (_, errors):
        done = run("playbooks/app.yml", django_source=source)
    assert done.returncode != 0
    assert f"mailroom is not healthy on {host_name}: /healthz at 127.0.0.1:8000 returns 500" in flat(done)
    assert [state(name)[:2] for name in HOSTS] == [[release, environment] for release, environment, _ in before]
    assert errors == []
    if host_name == "web1":
        # The next host does not get the release that failed on the first host.
        assert state("web2") == before[1]


def test_environment_with_which_no_service_starts_reaches_only_the_first_host(run, state, traffic):
    before = [state(name) for name in HOSTS]
    with traffic(80) as (_, errors):
        done = run("playbooks/app.yml", app_environment={"GUNICORN_CMD_ARGS": "--no-such-option"}, app_environment_names=[])
    assert done.returncode != 0
    assert "unrecognized arguments: --no-such-option" in done.stdout
    assert [state(name)[:2] for name in HOSTS] == [[release, environment] for release, environment, _ in before]
    assert state("web2") == before[1]
    assert errors == []


def test_drained_host_gets_requests_only_if_no_other_responds(url, on):
    """The deployment creates and removes this file."""
    mark = "/etc/nginx/mailroom-control/web1:8000"

    def served(count):
        before = int(on("web1", "journalctl --unit mailroom-web --output cat | grep -c 'GET /healthz'"))
        for _ in range(count):
            assert requests.get(f"{url(80)}/healthz", timeout=10).status_code == 200
        return int(on("web1", "journalctl --unit mailroom-web --output cat | grep -c 'GET /healthz'")) - before

    assert served(10) > 0
    on("hub", f"install -D /dev/null {mark}")
    try:
        assert served(10) == 0
        on("web2", "systemctl stop mailroom-web.socket mailroom-web.service")
        try:
            assert served(10) == 10
        finally:
            on("web2", "systemctl start mailroom-web.socket mailroom-web.service")
    finally:
        on("hub", f"rm {mark}")


def test_urls_in_responses_have_the_port_of_the_request(url, variables):
    email = {"subject": "port", "text": "Hello.", "to": ["one@example.net"]}
    headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}
    answer = requests.post(f"{url(80)}/api/emails", json=email, headers=headers, timeout=10)
    assert answer.status_code == 202, answer.text
    assert answer.json()["status_url"].startswith(f"{url(80)}/"), answer.json()


@pytest.fixture
def require_stable_workers(on):
    """Fails unless the workers and beat run, and none of them restarts within ten seconds."""
    units = "mailroom-worker@mail mailroom-worker@maintenance mailroom-beat"
    look = f"systemctl show --property ActiveState --property NRestarts --value {units} | xargs"

    def check():
        # While the broken release was active, systemd restarted some of them.
        before = on("hub", look)
        time.sleep(10)
        assert on("hub", look) == before
        assert before.split()[1::2] == ["active"] * 3

    return check


# beat exits after systemd considers it started. The worker runs, but does not answer a ping.
BROKEN_WORKERS = {
    "beat": """
import sys
import threading

if "beat" in sys.argv:
    threading.Timer(6, lambda: os._exit(3)).start()
""",
    "worker@mail": "\napp.conf.worker_enable_remote_control = False\n",
}


@pytest.mark.parametrize("unit", BROKEN_WORKERS)
def test_release_whose_workers_do_not_work_is_switched_back_on_all_hosts(
    run, state, project, traffic, require_stable_workers, unit
):
    before = [state(name)[:2] for name in HOSTS]
    with traffic(80) as (_, errors):
        done = run("site.yml", "--tags", "django,celery", django_source=project("mailroom/celery.py", BROKEN_WORKERS[unit]))
    assert done.returncode != 0
    assert f"mailroom-{unit}" in flat(done).rpartition("PLAY RECAP")[0].rpartition("TASK [Report the cause]")[2]
    for name, (release, _) in zip(HOSTS, before, strict=True):
        assert f"Release {release.rsplit('/', 1)[1]} is active again on {name}" in flat(done)
    assert [state(name)[:2] for name in HOSTS] == before
    require_stable_workers()
    assert errors == []


def test_environment_with_which_no_worker_answers_is_switched_back(run, state, require_stable_workers):
    """Only the workers log in as this broker user."""
    before = [state(name)[:2] for name in HOSTS]
    done = run("site.yml", "--tags", "django,celery", app_worker_broker_url="amqps://mailroom-worker:wrong@127.0.0.1:5671/mailroom")
    assert done.returncode != 0
    assert "mailroom-worker@mail" in flat(done)
    assert [state(name)[:2] for name in HOSTS] == before
    require_stable_workers()


def test_command_after_the_switch_runs_until_it_succeeds_once(run, on, project):
    """The command prints the active release, and fails until a file exists."""
    code = "import os, sys; os.system('readlink /opt/mailroom/current >> /tmp/after'); sys.exit(not os.path.exists('/tmp/ready'))"
    command = {"command": f'shell -c "{code}"', "after_switch": True}
    source = project("mailroom/other.py", "# A release with a command after the switch.\n")
    assert run("playbooks/app.yml", django_source=source, django_commands=[command]).returncode != 0
    on("web1", "touch /tmp/ready")
    for _ in range(2):
        done = run("playbooks/app.yml", django_source=source, django_commands=[command])
        assert done.returncode == 0, done.stdout
    lines = on("web1", "cat /tmp/after").split()
    assert lines == [on("web1", "readlink /opt/mailroom/current")] * 2
    done = run("playbooks/ops/rollback.yml")
    assert done.returncode == 0, done.stdout


def test_each_activation_and_its_result_are_logged(run, log, project):
    before = {name: log(name) for name in HOSTS}
    source = project("mailroom/settings.py", UNHEALTHY.replace("HOSTS", repr(["web1"])))
    assert run("playbooks/app.yml", django_source=source).returncode != 0
    assert run("playbooks/app.yml", django_source=project("mailroom/other.py", "# A release in the log.\n")).returncode == 0
    assert run("playbooks/ops/rollback.yml").returncode == 0
    for name in HOSTS:
        lines = log(name)
        assert lines[: len(before[name])] == before[name]
        failed, deployed, returned = lines[len(before[name]) :]
        assert re.fullmatch(r"\S+Z deploy [0-9a-f]{12} after [0-9a-f]{12} by \S+@\S+: failed, .*returns 500.*", failed), failed
        assert re.fullmatch(r"\S+Z deploy [0-9a-f]{12} after [0-9a-f]{12} by \S+@\S+: active", deployed), deployed
        assert re.fullmatch(r"\S+Z rollback [0-9a-f]{12} after [0-9a-f]{12} by \S+@\S+: active", returned), returned


def test_second_run_at_the_same_time_is_refused(run, on, eventually):
    """Killing the first run releases its lock."""
    lock = "/run/mailroom-deploy.lock"
    words = [Path(sys.executable).with_name("ansible-playbook"), "site.yml"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            record = json.loads(eventually(lambda: on("web1", f"flock -n {lock} true || cat {lock}"), seconds=60))
            done = run("playbooks/ops/rollback.yml")
        finally:
            first.kill()
    assert done.returncode != 0
    who = f"{record['user']}@{record['controller']} since {record['since']}"
    assert f"Another run is deploying this environment: {who}" in flat(done)
    eventually(lambda: on("web1", f"flock -n {lock} echo free || true") == "free")


def test_maintenance_page(run, url):
    for _ in range(2):
        assert run("playbooks/ops/maintenance.yml", maintenance="on").returncode == 0
        answer = requests.get(f"{url(80)}/healthz", timeout=10)
        assert (answer.status_code, answer.headers["Content-Type"]) == (503, "text/html")
        assert "The team's own page." in answer.text
        assert int(answer.headers["Retry-After"]) > 0
        assert run("playbooks/ops/maintenance.yml", maintenance="off").returncode == 0
        assert requests.get(f"{url(80)}/healthz", timeout=10).status_code == 200


# With pipelining, Python reads Ansible's modules from its standard input.
MODULES = "pkill --signal KILL --full 'python3[.0-9]*( && sleep 0.?)?$' || true"


@pytest.fixture
def run_until(on):
    """Runs playbooks/app.yml, and kills Ansible and its modules on the hosts when a step has begun."""

    def run(step, **variables):
        words = [Path(sys.executable).with_name("ansible-playbook"), "playbooks/app.yml", "-e", json.dumps(variables)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            output = []
            while step not in (line := process.stdout.readline()):
                output.append(line)
                assert line, "".join(output)
            time.sleep(0.3)
            process.kill()
        for name in HOSTS:
            on(name, MODULES)

    return run


def test_failure_after_a_killed_run_returns_to_the_release_before_both(run, run_until, state, project):
    """The killed run has switched the first web host. The next run fails on the second one."""
    before = [state(name)[0] for name in HOSTS]
    source = project("mailroom/settings.py", UNHEALTHY.replace("HOSTS", repr(["web2"])))
    run_until("Undrain | Forward requests to the host again", django_source=source)
    assert state("web1")[0] != before[0]
    done = run("playbooks/app.yml", django_source=source)
    assert done.returncode != 0
    assert "mailroom is not healthy on web2" in flat(done)
    assert [state(name)[0] for name in HOSTS] == before


# The steps of a deployment at which a run is killed, in their order.
STEPS = [
    "Release | Unpack the source",
    "Release | Collect the static files",
    "Commands | Check the project and migrate its database",
    "Drain | Forward requests to the other web hosts",
    "Switch | Replace the environment file",
    "Switch | Point the link to the release",
    "Manage the units of mailroom/django",
    "Undrain | Forward requests to the host again",
    "Clean | Set the time of the activation",
]


def test_run_repairs_one_that_was_killed_at_any_step(run, run_until, state, on, project, traffic):
    """Each run is killed at a later step than the one before. The last run completes."""
    before = [state(name)[0] for name in HOSTS]
    source = project("mailroom/other.py", "# A release of killed runs.\n")
    with traffic(80) as (durations, errors):
        for step in STEPS:
            run_until(step, django_source=source)
            assert errors == [], step
        done = run("playbooks/app.yml", django_source=source)
        assert done.returncode == 0, done.stdout
        after = [state(name)[0] for name in HOSTS]
        done = run("playbooks/app.yml", django_source=source)
        assert re.findall(r"changed=([1-9]\d*)", done.stdout) == [], done.stdout
    assert len(set(after)) == 1
    assert after != before
    assert on("hub", "ls /etc/nginx/mailroom-control") == ""
    assert len(durations) > 100
    assert (errors, max(durations) < 5) == ([], True), sorted(durations)[-10:]
