"""Tests that a release or an environment that does not work changes nothing, and tests rollbacks.

The tests run on one host, since each builds a release and runs a playbook.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import testinfra

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def host(request):
    """One host. Without this fixture, the tests would run on each host of the scenario."""
    return testinfra.get_host("ansible://debian13", ansible_inventory=request.config.option.ansible_inventory)


def running(host):
    """The services' environment file and release, and the start time of each unit."""
    units = "mailroom-web.service mailroom-relay.service"
    with host.sudo():
        environment = host.check_output("sha256sum /opt/mailroom/current/environment")
        release = host.check_output("readlink /opt/mailroom/current")
        return environment, release, host.check_output(f"systemctl show --property ExecMainStartTimestampMonotonic --value {units}")


def test_environment_that_the_application_rejects_changes_nothing(host, run_playbook, variables):
    """The first play accepts the value, because only the application's code contains the allowed values."""
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
        assert host.run("test -e $(readlink -f /opt/mailroom/current/environment).new").rc == 1


def web_state(host):
    with host.sudo():
        return host.check_output("systemctl is-active mailroom-web.service"), host.check_output("readlink /opt/mailroom/current")


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


MIDDLEWARE = """
import sys

MIDDLEWARE.insert(0, "mailroom.settings.broken")


def broken(get_response):
    return lambda request: 1 / 0 if CONDITION else get_response(request)
"""


def test_unhealthy_release_is_refused_before_the_switch(host, run_playbook, project):
    """The application imports, passes its checks, and answers each request with an error."""
    before = running(host)
    done = run_playbook("playbooks/app.yml", django_source=project("mailroom/settings.py", MIDDLEWARE.replace("CONDITION", "True")))
    assert done.returncode != 0
    assert "returns 500" in done.stdout
    assert running(host) == before


def test_environment_without_health_is_refused_before_the_switch(host, run_playbook):
    before = running(host)
    done = run_playbook("playbooks/app.yml", app_allowed_hosts=["other.example.org"], django_health_host="localhost")
    assert done.returncode != 0
    assert "/healthz with the Host localhost returns 400" in done.stdout
    assert running(host) == before


def test_release_that_is_unhealthy_only_as_a_service_is_switched_back(host, run_playbook, project, site):
    before = web_state(host)
    text = MIDDLEWARE.replace("CONDITION", "'gunicorn' in sys.modules")
    done = run_playbook("playbooks/app.yml", django_source=project("mailroom/settings.py", text))
    assert done.returncode != 0
    assert "/healthz at 127.0.0.1:8000 returns 500" in done.stdout
    assert f"Release {before[1].rsplit('/', 1)[1]} is active again" in done.stdout.replace("\n", " ")
    assert web_state(host) == before
    assert requests.get(f"{site}/healthz", timeout=10).status_code == 200


def test_deployment_and_rollback_drop_no_request(host, run_playbook, project, traffic):
    with host.sudo():
        units = "systemctl show --property MainPID --value mailroom-web.service"
        before = host.check_output(units)
        with traffic(8000) as (durations, errors):
            done = run_playbook("playbooks/app.yml", django_source=project("mailroom/other.py", "# A release under load.\n"))
            assert done.returncode == 0, done.stdout
            done = run_playbook("playbooks/ops/rollback.yml")
            assert done.returncode == 0, done.stdout
        assert host.check_output(units) != before
        assert host.run("systemctl is-active mailroom-web-standby.service").stdout.strip() == "inactive"
    assert len(durations) > 100
    # Without a second instance, requests wait for seconds, until the new process has loaded the application.
    assert (errors, max(durations) < 2) == ([], True), sorted(durations)[-10:]


def test_release_whose_service_does_not_start_gets_no_request(host, run_playbook, traffic):
    """Commands work with this environment, but gunicorn does not start. The old process keeps running until the new one works."""
    before = web_state(host)
    broken = {"app_environment": {"GUNICORN_CMD_ARGS": "--no-such-option"}, "app_environment_names": []}
    with traffic(8000) as (durations, errors):
        done = run_playbook("playbooks/app.yml", **broken)
    assert done.returncode != 0
    assert "unrecognized arguments: --no-such-option" in done.stdout
    assert f"Release {before[1].rsplit('/', 1)[1]} is active again" in done.stdout.replace("\n", " ")
    assert web_state(host) == before
    assert (errors, max(durations) < 2) == ([], True), sorted(durations)[-10:]
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
