"""Tests the application that the role django installs, on a host without a broker."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import re
import threading
from pathlib import Path

import pytest
import requests

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


def test_only_the_application_can_read_secrets(host, variables, environment_secrets):
    assert host.run("cat /opt/mailroom/current/environment").rc != 0
    with host.sudo():
        assert variables["secret_django_key"] in host.check_output("cat /opt/mailroom/current/environment")
        seen = host.check_output("systemctl cat 'mailroom*'; ps -e -o args; journalctl --no-pager")
    assert [name for name, secret in environment_secrets.items() if secret in seen] == []


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


# ---- A compromised service ----

PLANTED = base64.b64encode(b"import os; open('/var/lib/mailroom/planted', 'w')\n").decode()


def test_services_own_and_write_no_code(host):
    """Neither the application's user nor the build user can change a release, the environments or Flower's folder."""
    for user in ("mailroom", "mailroom-build"):
        with host.sudo():
            writable = f"find /opt/mailroom /etc/mailroom /usr/local/bin -not -type l '(' -writable -o -user {user} ')'"
            # find needs a working directory that the user can read.
            assert host.check_output(f"cd / && runuser -u {user} -- {writable}") == ""
            home = host.check_output(f"getent passwd {user} | cut -d: -f6")
            assert host.run(f"cd / && runuser -u {user} -- test -w {home}").rc == 1
    with host.sudo():
        assert host.check_output("find / -xdev -user mailroom-build -print") == ""


def test_code_that_a_compromised_service_planted_is_not_run(host, run_playbook):
    """Ansible runs the host's Python as the application's user. Python runs `.pth` files of the user's site-packages."""
    version = host.check_output("python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'")
    with host.sudo():
        homes = {"/var/lib/mailroom", host.check_output("getent passwd mailroom | cut -d: -f6")}
        for home in homes:
            packages = f"{home}/.local/lib/python{version}/site-packages"
            host.run(f"cd / && runuser -u mailroom -- mkdir -p {packages}")
            host.run(f"cd / && echo '{PLANTED}' | base64 -d | runuser -u mailroom -- tee {packages}/planted.pth")
        host.check_output("test -s /var/lib/mailroom/.local/lib/*/site-packages/planted.pth")
    done = run_playbook("playbooks/app.yml")
    assert done.returncode == 0, done.stdout
    with host.sudo():
        assert not host.file("/var/lib/mailroom/planted").exists
        # The planted file works: Python runs it if HOME is the directory that contains the file.
        host.check_output("cd / && runuser -u mailroom -- env HOME=/var/lib/mailroom python3 -c ''")
        assert host.file("/var/lib/mailroom/planted").exists
        host.check_output("rm -r /var/lib/mailroom/planted /var/lib/mailroom/.local")


def test_run_with_changed_secrets_prints_no_secret(host, run_playbook, environment_secrets):
    names = ("secret_django_key", "secret_app_metrics_token", "secret_rabbitmq_app_password")
    changed = {name: f"Changed-{name}-0123456789-0123456789-0123456789" for name in names}
    done = run_playbook("playbooks/app.yml", "-vvv", "--diff", **changed)
    assert done.returncode == 0, done.stdout
    assert "--- before: /etc/mailroom/environments/" in done.stdout
    with host.sudo():
        text = host.check_output("cat /opt/mailroom/current/environment /opt/mailroom/current/environment.web")
    assert [name for name in names if changed[name] not in text] == []
    again = run_playbook("playbooks/app.yml", "-vvv", "--diff")
    assert again.returncode == 0, again.stdout
    output = done.stdout + done.stderr + again.stdout + again.stderr
    assert [name for name in changed if changed[name] in output] == []
    assert [name for name, value in environment_secrets.items() if value in output] == []


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
