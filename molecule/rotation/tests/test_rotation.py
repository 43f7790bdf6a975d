"""Rotates the secrets of a running environment under load. Each test needs the rotations of the tests before it in this file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import requests
import yaml

PROJECT = Path(__file__).resolve().parents[3]
FILE = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "inventory/group_vars/all/91-secrets.yml")
ROTATE = "playbooks/ops/rotate_secrets.yml"


def stored():
    return yaml.safe_load(FILE.read_text())


def before_rotation():
    """The secrets before the rotation that is not finished yet."""
    values = stored()
    assert "secret_django_key_old" in values, "no rotation is unfinished"
    return {name: values.get(f"{name}_old", value) for name, value in values.items() if not name.endswith("_old")}


def api_status(site, value):
    """The status for an email that does not exist: 404 with a valid API key, else 401."""
    return requests.get(f"{site}/api/emails/{uuid.uuid4()}", headers=key(value), timeout=20).status_code


def all_sent(load):
    """Whether all emails of a load were sent."""
    url = f"{load.site}/api/emails"
    return {requests.get(f"{url}/{each}", headers=load.headers, timeout=20).json()["state"] for each in load.ids} == {"sent"}


def rotate(*arguments, playbook=ROTATE):
    words = [Path(sys.executable).parent / "ansible-playbook", playbook, *arguments]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"}
    return subprocess.Popen(
        words, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(*arguments, **more):
    done = rotate(*arguments, **more)
    output = done.communicate()[0]
    assert done.returncode == 0, output
    return output


def key(value):
    return {"Authorization": f"Bearer {value}"}


class Load:
    """Sends about 5 emails and 17 other requests per second, with the API key that is valid when the load begins."""

    def __init__(self, site):
        self.site, self.headers = site, key(stored()["secret_app_api_key"])
        self.ids, self.errors, self.durations, self.ended = [], [], [], threading.Event()
        # Each thread sends two requests per second, half of them on connections that it keeps.
        self.threads = [threading.Thread(target=self.run, args=(self.email if n < 3 else self.look, n % 2)) for n in range(13)]

    def run(self, act, keep):
        session = requests.Session()
        while not self.ended.wait(0.5):
            begin = time.monotonic()
            try:
                act(session if keep else requests)
            except (AssertionError, requests.RequestException) as error:
                self.errors.append(f"{time.strftime('%T')} {error!r}")
            self.durations.append(time.monotonic() - begin)

    def email(self, client):
        email = {"subject": "load", "text": "Hello.", "to": ["one@example.net"]}
        answer = client.post(f"{self.site}/api/emails", json=email, headers=self.headers, timeout=20)
        assert answer.status_code == 202, (answer.status_code, answer.text[:200])
        self.ids.append(answer.json()["id"])

    def look(self, client):
        answer = client.get(f"{self.site}/healthz", timeout=20)
        assert answer.status_code == 200, answer.status_code

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def manage(root):
    """Runs Python code in the application's environment; returns its output."""

    def run(code):
        done = root(f"mailroom-manage shell -v 0 -c '{code}'")
        assert done.rc == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    return run


@pytest.fixture
def signed_in(site):
    """Whether a browser is still logged in. Django replaces a session that an old key signed, so the browser stores cookies."""

    def check(browser):
        answer = browser.get(f"{site}/", allow_redirects=False, timeout=20)
        assert answer.status_code in (200, 302), answer.status_code
        return answer.status_code == 200

    return check


def log_in(manage):
    """Returns a browser with a session that the current key signs. A login with a password would need its form."""
    browser = requests.Session()
    cookie = manage(
        "from django.contrib.auth import get_user_model, SESSION_KEY, BACKEND_SESSION_KEY, HASH_SESSION_KEY as H;"
        "from importlib import import_module; from django.conf import settings as s;"
        'u, _ = get_user_model().objects.get_or_create(username="rotation");'
        "c = import_module(s.SESSION_ENGINE).SessionStore();"
        "c[SESSION_KEY] = str(u.pk); c[BACKEND_SESSION_KEY] = s.AUTHENTICATION_BACKENDS[-1]; c[H] = u.get_session_auth_hash();"
        "c.create(); print(c.session_key)"
    )
    browser.cookies.set("sessionid", cookie, domain="127.0.0.1", path="/")
    return browser


# The login of each user. A refused login is not an error of the command, so that a test can expect it.


@pytest.fixture
def database(root):
    def log_in(user, password):
        url = f"postgresql://{user}@127.0.0.1/mailroom?sslmode=require"
        done = root(f"PGPASSWORD={password} psql '{url}' -tAc 'SELECT current_user'")
        assert done.rc == 0 or "password authentication failed" in done.stderr, done.stderr
        return done.stdout.strip()

    return log_in


@pytest.fixture
def broker(root):
    def log_in(user, password):
        return root(f"rabbitmqctl authenticate_user {user} {password}").rc == 0

    return log_in


def test_rotation_under_load_refuses_and_loses_nothing(site, manage, signed_in, eventually):
    old, browser = stored(), log_in(manage)
    assert signed_in(browser)
    with Load(site) as load:
        time.sleep(5)
        output = finished("-e", "rotate=all")
        time.sleep(5)
    print(f"{len(load.durations)} requests, {len(load.ids)} emails, longest {max(load.durations):.2f} s")
    assert load.errors == []
    assert len(load.ids) > 100
    assert "Remove the old values with -e rotate=finish" in output
    new = stored()
    # The playbook never rotates the first three secrets in this set. The environment has no cache and no monitoring.
    assert {name for name in old if new[name] == old[name]} == {
        "secret_backups_password",
        "secret_postgresql_archive_password",
        "secret_certificate_authority",
        "secret_monitoring_password",
        "secret_postgresql_monitoring_password",
        "secret_valkey_password",
    }
    assert signed_in(browser)
    eventually(lambda: all_sent(load), seconds=120)


def test_old_api_key_and_database_password_are_still_valid(site, database):
    old, new = before_rotation(), stored()
    assert [api_status(site, values["secret_app_api_key"]) for values in (old, new)] == [404, 404]
    # Objects that a migration creates belong to the same owner, regardless of the user who logs in.
    assert database("mailroom", old["secret_postgresql_app_password"]) == "mailroom"
    assert database("mailroom-next", new["secret_postgresql_app_password"]) == "mailroom"


BROKER_USERS = {
    "mailroom": "app",
    "admin": "administrator",
    **{f"mailroom-{kind}": kind for kind in ("worker", "beat", "flower", "monitoring")},
}


@pytest.mark.parametrize("user", BROKER_USERS)
def test_old_broker_password_is_refused(broker, user):
    name = BROKER_USERS[user]
    passwords = [values[f"secret_rabbitmq_{name}_password"] for values in (stored(), before_rotation())]
    assert [broker(user, password) for password in passwords] == [True, False]


def test_old_flower_password_is_refused(url):
    passwords = [values["secret_flower_password"] for values in (stored(), before_rotation())]
    assert [requests.get(f"{url(5555)}/", auth=("flower", value), timeout=20).status_code for value in passwords] == [200, 401]


def test_old_metrics_token_is_refused(site):
    tokens = [values["secret_app_metrics_token"] for values in (stored(), before_rotation())]
    assert [requests.get(f"{site}/metrics", headers=key(value), timeout=20).status_code for value in tokens] == [200, 401]


def test_old_password_of_the_administrator_is_refused(manage):
    look = 'from django.contrib.auth import get_user_model as m; print(m().objects.get(username="admin").check_password("{}"))'
    passwords = [values["secret_app_admin_password"] for values in (stored(), before_rotation())]
    assert [manage(look.format(value)) for value in passwords] == ["True", "False"]


def test_broker_runs_with_the_new_erlang_cookie(root):
    cookie = root("cat /var/lib/rabbitmq/.erlang.cookie").stdout
    assert cookie == stored()["secret_rabbitmq_erlang_cookie"] != before_rotation()["secret_rabbitmq_erlang_cookie"]
    assert root("rabbitmqctl ping").rc == 0


def test_finish_ends_the_old_values_and_refuses_no_request(site, database, manage):
    old, new = before_rotation(), stored()
    with Load(site) as load:
        finished("-e", "rotate=finish")
    assert load.errors == []
    assert [name for name in stored() if name.endswith("_old")] == []
    assert [api_status(site, values["secret_app_api_key"]) for values in (new, old)] == [404, 401]
    for user in ("mailroom", "mailroom-next"):
        assert [database(user, values["secret_postgresql_app_password"]) for values in (new, old)] == ["mailroom", ""]
    check = (
        "from django.core import signing;"
        'text = signing.dumps("x", key="{}");\n'
        'try:\n    print(signing.loads(text))\nexcept signing.BadSignature:\n    print("refused")'
    )
    assert [manage(check.format(values["secret_django_key"])) for values in (new, old)] == ["x", "refused"]


def test_killed_rotation_is_repaired_by_the_same_command_under_load(site, eventually, broker):
    old = stored()
    with Load(site) as load:
        process = rotate("-e", "rotate=all")
        try:
            eventually(lambda: stored()["secret_django_key"] != old["secret_django_key"], seconds=120)
            # The broker has the new password, the application does not.
            eventually(lambda: broker("mailroom", stored()["secret_rabbitmq_app_password"]), seconds=300)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        killed = stored()
        output = finished("-e", "rotate=all")
        time.sleep(5)
    assert load.errors == []
    assert "Rotated by an earlier run: " in output
    assert stored() == killed
    assert [api_status(site, values["secret_app_api_key"]) for values in (old, killed)] == [404, 404]
    eventually(lambda: all_sent(load), seconds=120)


def test_emergency_ends_the_old_values_at_once(site, database, signed_in, manage):
    old, browser = stored(), log_in(manage)
    output = finished("-e", "rotate=django,api_keys,database", "-e", "rotate_emergency=true")
    assert output.index("everybody must log in again") < output.index("PLAY [Validate the variables]")
    new = stored()
    assert [api_status(site, values["secret_app_api_key"]) for values in (new, old)] == [404, 401]
    assert [database("mailroom", values["secret_postgresql_app_password"]) for values in (new, old)] == ["mailroom", ""]
    assert not signed_in(browser)
