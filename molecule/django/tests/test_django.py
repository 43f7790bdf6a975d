"""Tests the application that the role django installs, on a host without a broker."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
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


def test_only_the_application_can_read_secrets(host, variables):
    assert host.run("cat /opt/mailroom/current/environment").rc != 0
    with host.sudo():
        assert variables["secret_django_key"] in host.check_output("cat /opt/mailroom/current/environment")
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
        environment = host.check_output("sha256sum /opt/mailroom/current/environment")
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
        assert host.check_output("find /etc/mailroom/environments -name '*.new'") == ""


# ---- A captured service ----


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


def test_code_that_a_captured_service_planted_is_not_run(host, run_playbook):
    """Ansible runs the host's Python as the application's user. Python runs `.pth` files of the user's site-packages."""
    version = host.check_output("python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'")
    with host.sudo():
        homes = {"/var/lib/mailroom", host.check_output("getent passwd mailroom | cut -d: -f6")}
        for home in homes:
            packages = f"{home}/.local/lib/python{version}/site-packages"
            planted = f"mkdir -p {packages} && echo 'import os; open(\"/tmp/planted\", \"w\")' > {packages}/planted.pth"
            host.run(f"cd / && runuser -u mailroom -- sh -c '{planted}'")
        host.check_output("test -e /var/lib/mailroom/.local")
    done = run_playbook("playbooks/app.yml")
    assert done.returncode == 0, done.stdout
    with host.sudo():
        assert not host.file("/tmp/planted").exists
        # The file works if Python reads it: HOME is the planted directory.
        host.check_output("cd / && runuser -u mailroom -- env HOME=/var/lib/mailroom python3 -c ''")
        assert host.file("/tmp/planted").exists
        host.check_output("rm -r /tmp/planted /var/lib/mailroom/.local")


# ---- Releases ----


def web_state(host):
    with host.sudo():
        return host.check_output("systemctl is-active mailroom-web.service"), host.check_output("readlink /opt/mailroom/current")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Returns a function that makes a copy of the project with another content of a file."""

    def changed(path, text):
        folder = tmp_path_factory.mktemp("project") / "app"
        names = [".venv", "tests", "__pycache__", ".pytest_cache", "staticfiles"]
        shutil.copytree(PROJECT / "app", folder, ignore=shutil.ignore_patterns(*names))
        file = folder / path
        file.write_text((file.read_text() if file.exists() else "") + text)
        return str(folder)

    return changed


BROKEN = [
    ("mailroom/wsgi.py", "\nraise RuntimeError('broken wsgi')\n", "RuntimeError: broken wsgi", {}),
    ("mailroom/celery.py", "\nraise RuntimeError('broken celery')\n", "RuntimeError: broken celery", {}),
    ("mailroom/asgi.py", "from django.core.asgi import get_asgi_application\napplication = get_asgi_application()\n",
     "mailroom.asgi:application is an ASGI application", {"django_wsgi": "mailroom.asgi:application"}),
    ("mailroom/settings.py", "\nDATABASES['default'] = {'ENGINE': 'django.db.backends.sqlite3', 'NAME': BASE_DIR / 'db.sqlite3'}\n",
     "db.sqlite3 in the release", {}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "text", "cause", "more"), BROKEN, ids=["wsgi", "celery", "asgi", "database"])
def test_release_that_does_not_work_is_refused_before_the_switch(host, run_playbook, project, path, text, cause, more):
    before = running(host)
    done = run_playbook("playbooks/app.yml", django_source=project(path, text), **more)
    assert done.returncode != 0
    assert cause in done.stdout
    assert running(host) == before


def test_unhealthy_release_is_switched_back(host, run_playbook, project, site):
    """The application imports, passes its checks, and answers each request with an error."""
    before = web_state(host)
    text = "\nMIDDLEWARE.insert(0, 'mailroom.settings.broken')\ndef broken(get_response):\n    return lambda request: 1 / 0\n"
    done = run_playbook("playbooks/app.yml", django_source=project("mailroom/settings.py", text))
    assert done.returncode != 0
    assert "/healthz at 127.0.0.1:8000 returns 500" in done.stdout
    assert f"Release {before[1].rsplit('/', 1)[1]} is active again" in done.stdout.replace("\n", " ")
    assert web_state(host) == before
    assert requests.get(f"{site}/healthz", timeout=10).status_code == 200


def test_environment_without_health_is_switched_back(host, run_playbook, site):
    before = web_state(host)
    done = run_playbook("playbooks/app.yml", app_allowed_hosts=["other.example.org"], django_health_host="localhost")
    assert done.returncode != 0
    assert "/healthz at 127.0.0.1:8000 returns 400" in done.stdout
    assert web_state(host) == before
    assert requests.get(f"{site}/healthz", timeout=10).status_code == 200
    done = run_playbook("playbooks/app.yml")
    assert (done.returncode, "changed=0" in done.stdout) == (0, True), done.stdout


def test_rollback_returns_to_the_earlier_release(host, run_playbook, project, site):
    _, first = web_state(host)
    done = run_playbook("playbooks/app.yml", django_source=project("mailroom/new.py", "# A new release.\n"))
    assert done.returncode == 0, done.stdout
    _, second = web_state(host)
    assert second != first
    done = run_playbook("playbooks/ops/rollback.yml")
    assert done.returncode == 0, done.stdout
    assert web_state(host) == ("active", first)
    assert requests.get(f"{site}/healthz", timeout=10).status_code == 200
    done = run_playbook("playbooks/ops/rollback.yml", django_rollback_release="no-such-one")
    assert done.returncode != 0
    assert f"from the last activated one: {first.rsplit('/', 1)[1]}, {second.rsplit('/', 1)[1]}" in done.stdout.replace("\n", " ")


def test_rollback_over_a_migration_is_refused(host, run_playbook, project):
    """The database gets a migration that only the newer release contains."""
    before = web_state(host)
    text = "from django.db import migrations\nclass Migration(migrations.Migration):\n    dependencies = []\n"
    newest = sorted(path.stem for path in (PROJECT / "app/emails/migrations").glob("0*.py"))[-1]
    text = text.replace("[]", f"[('emails', '{newest}')]")
    done = run_playbook("playbooks/app.yml", django_source=project("emails/migrations/9999_new.py", text))
    assert done.returncode == 0, done.stdout
    done = run_playbook("playbooks/ops/rollback.yml")
    assert done.returncode != 0
    assert "emails.9999_new" in done.stdout
    assert web_state(host) != before
    done = run_playbook("playbooks/ops/rollback.yml", django_rollback_over_migrations=True)
    assert done.returncode == 0, done.stdout
    assert web_state(host) == before
