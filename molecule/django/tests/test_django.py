"""Tests the application that the role django installs, on a host without a broker."""

from __future__ import annotations

import concurrent.futures
import json
import re
import threading
from pathlib import Path

import pytest
import requests
import yaml

PROJECT = Path(__file__).resolve().parents[3]
EMAIL = {"subject": "Hello", "text": "Hello.", "to": ["somebody@example.net"]}


@pytest.fixture(scope="module")
def key(variables):
    return {"Authorization": f"Bearer {variables['secret_app_api_key']}"}


def test_email_is_accepted_without_a_broker(site, key):
    answer = requests.post(f"{site}/api/emails", json=EMAIL, headers=key, timeout=5)
    assert answer.status_code == 202
    assert answer.elapsed.total_seconds() < 2
    status = requests.get(f"{site}/api/emails/{answer.json()['id']}", headers=key, timeout=5).json()
    assert status["state"] == "queued"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_email_without_a_valid_key_is_refused(site, headers):
    assert requests.post(f"{site}/api/emails", json=EMAIL, headers=headers, timeout=5).status_code == 401


def test_disallowed_sender_is_refused(site, key):
    answer = requests.post(f"{site}/api/emails", json={**EMAIL, "from": "boss@elsewhere.test"}, headers=key, timeout=5)
    assert answer.status_code == 422
    assert "from" in answer.text


def test_page_requires_login_and_accepts_the_administrator(site, variables):
    session = requests.Session()
    assert "/login" in session.get(f"{site}/", timeout=5).url
    login = session.get(f"{site}/login/", timeout=5)
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', login.text).group(1)
    form = {"csrfmiddlewaretoken": token, "username": "admin", "password": variables["secret_app_admin_password"]}
    page = session.post(f"{site}/login/", data=form, headers={"Referer": f"{site}/login/"}, timeout=5)
    assert page.status_code == 200
    assert "/login" not in page.url


def test_static_files_are_served(site):
    page = requests.get(f"{site}/login/", timeout=5)
    assert page.status_code == 200
    sheet = re.search(r'href="(/static/[^"]+\.css)"', page.text).group(1)
    assert requests.get(f"{site}{sheet}", timeout=5).headers["Content-Type"].startswith("text/css")


def test_error_page_reveals_no_details(site):
    page = requests.get(f"{site}/missing", timeout=5)
    assert page.status_code == 404
    assert "DEBUG" not in page.text


def test_restart_loses_no_request(site, host):
    """Four clients send requests continuously before, during and after the restart."""
    restarted = threading.Event()

    def ask():
        answers = []
        while not restarted.is_set():
            answers.append(requests.get(f"{site}/healthz", timeout=20).status_code)
        return answers

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        try:
            assert host.run("sudo systemctl restart mailroom-web.service").rc == 0
        finally:
            restarted.set()
        answers = [answer for client in clients for answer in client.result()]
    assert set(answers) == {200}


def test_relay_keeps_running_without_a_broker(host):
    with host.sudo():
        shown = host.check_output("systemctl show --property ActiveState,NRestarts mailroom-relay.service")
    assert shown.split() == ["NRestarts=0", "ActiveState=active"] or shown.split() == ["ActiveState=active", "NRestarts=0"]


def test_only_the_application_can_read_secrets(host, variables):
    assert host.run("cat /etc/mailroom/environment").rc != 0
    with host.sudo():
        assert variables["secret_django_key"] in host.check_output("cat /etc/mailroom/environment")
        seen = host.check_output("systemctl cat 'mailroom*'; ps -e -o args; journalctl --no-pager")
    for name, secret in variables.items():
        if name.startswith("secret_") and name != "secret_names":
            assert secret not in seen, name


def test_service_cannot_write_its_code(host):
    """The command runs in the mount namespace of the running service, as the service's user."""
    with host.sudo():
        pid = host.check_output("systemctl show --property MainPID --value mailroom-web.service")
        result = host.run(f"nsenter --mount --target {pid} runuser -u mailroom -- touch /opt/mailroom/current/probe")
    assert result.rc != 0
    assert "Read-only file system" in result.stderr


def test_management_commands_run_as_the_application(host):
    with host.sudo():
        assert host.check_output("/usr/local/bin/mailroom-manage shell -c 'import os; print(os.geteuid())' | tail -1") != "0"
        assert "[ ]" not in host.check_output("/usr/local/bin/mailroom-manage showmigrations")


def running(host):
    """The services' environment file and release, and the start time of each unit."""
    units = "mailroom-web.service mailroom-relay.service"
    with host.sudo():
        environment = host.check_output("sha256sum /etc/mailroom/environment")
        release = host.check_output("readlink /opt/mailroom/current")
        return environment, release, host.check_output(f"systemctl show --property ExecMainStartTimestampMonotonic --value {units}")


def test_environment_that_the_application_rejects_changes_nothing(host, run_playbook, variables):
    """The first play accepts the value, because only the application knows the allowed values."""
    before = running(host)
    done = run_playbook("playbooks/app.yml", app_environment={"LOG_LEVEL": "LOUD"})
    assert done.returncode != 0
    assert "`manage.py check --deploy --fail-level ERROR` failed" in done.stdout
    assert "LOG_LEVEL" in done.stdout
    assert "DEBUG, INFO, WARNING, ERROR or CRITICAL" in done.stdout
    assert variables["secret_django_key"] not in done.stdout
    assert running(host) == before
    done = run_playbook("playbooks/app.yml")
    assert done.returncode == 0, done.stdout
    assert running(host) == before
    with host.sudo():
        assert not host.file("/etc/mailroom/environment.new").exists


def test_run_fails_when_the_web_service_is_not_healthy(run_playbook):
    done = run_playbook("playbooks/app.yml", django_health_path="/no-such-path")
    assert done.returncode != 0
    assert "is not healthy: /no-such-path at 127.0.0.1:8000 returns 404" in done.stdout


def test_run_with_changed_secrets_prints_no_secret(host, run_playbook, variables):
    names = ("secret_django_key", "secret_app_metrics_token", "secret_rabbitmq_app_password")
    changed = {name: f"Changed-{name}-0123456789-0123456789-0123456789" for name in names}
    done = run_playbook("playbooks/app.yml", "-vvv", "--diff", **changed)
    assert done.returncode == 0, done.stdout
    assert "--- before: /etc/mailroom/environment" in done.stdout
    with host.sudo():
        text = host.check_output("cat /etc/mailroom/environment")
    assert [name for name in names if changed[name] not in text] == []
    again = run_playbook("playbooks/app.yml", "-vvv", "--diff")
    assert again.returncode == 0, again.stdout
    output = done.stdout + done.stderr + again.stdout + again.stderr
    secrets = {name: value for name, value in variables.items() if name.startswith("secret_") and name != "secret_names"}
    assert [name for name in changed if changed[name] in output] == []
    assert [name for name, value in secrets.items() if value in output] == []


def releases(host):
    """The names of the releases, the current one first."""
    current = host.check_output("basename $(readlink /opt/mailroom/current)")
    return [current, *sorted(set(host.check_output("ls /opt/mailroom/releases").split()) - {current})]


def test_older_releases_are_kept_and_pruned(host, run_playbook):
    """Earlier releases are represented by empty directories."""
    with host.sudo():
        (first, *_) = releases(host)
        for age in (1, 2, 3):
            host.check_output(f"install -d -m 0750 /opt/mailroom/releases/older{age}")
            host.check_output(f"touch --date '{age} years ago' /opt/mailroom/releases/older{age}")
    # A release without this file has another content, so it is another release.
    excluded = yaml.safe_load((PROJECT / "roles/django/defaults/main.yml").read_text())["django_source_exclude"]
    done = run_playbook("playbooks/app.yml", django_source_exclude=[*excluded, "README.md"], django_releases_kept=3)
    assert done.returncode == 0, done.stdout
    with host.sudo():
        (second, *others) = releases(host)
    assert second != first
    assert others == sorted([first, "older1"])
    done = run_playbook("playbooks/app.yml", django_releases_kept=2)
    assert done.returncode == 0, done.stdout
    with host.sudo():
        assert releases(host) == [first, second]


def python_environment(folder):
    """A playbook that creates a virtual environment from the requirements on the host."""
    role = {
        "role": "django_celery.stack.python_environment",
        "python_environment_path": "/opt/hashes/venv",
        "python_environment_requirements": "/opt/hashes/requirements.txt",
        "python_environment_owner": "root",
    }
    path = folder / "play.json"
    path.write_text(json.dumps([{"hosts": "all", "become": True, "roles": [role]}]))
    return path


@pytest.mark.parametrize(
    ("requirement", "refusal"),
    [
        pytest.param("asgiref==3.13.0", "--require-hashes", id="without a hash"),
        pytest.param(f"asgiref==3.13.0 --hash=sha256:{'0' * 64}", "Hash mismatch for `asgiref==3.13.0`", id="with another hash"),
    ],
)
def test_uv_refuses_a_package(host, run_playbook, tmp_path, requirement, refusal):
    with host.sudo():
        host.check_output(f"install -d /opt/hashes && echo '{requirement}' >/opt/hashes/requirements.txt")
    done = run_playbook(python_environment(tmp_path))
    assert done.returncode != 0
    assert refusal in done.stdout, done.stdout


def test_pip_refuses_uv_without_a_hash(host, run_playbook, tmp_path):
    done = run_playbook(
        python_environment(tmp_path),
        __python_environment_uv_folder="/opt/hashes/uv",
        __python_environment_uv_lock="uv==0.1.0\n",
    )
    assert done.returncode != 0
    assert "Hashes are required in --require-hashes mode" in done.stdout, done.stdout
    assert not host.file("/opt/hashes/uv/uv-0.1.0").exists
