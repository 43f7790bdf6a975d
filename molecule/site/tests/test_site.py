"""Tests the whole environment on one host: an email from the request to the inbox, failures, a reboot and drift."""

from __future__ import annotations

import re
import uuid

import pytest
import requests

WORKERS = ["django_celery.stack.services : Manage the units of mailroom/celery"]


@pytest.fixture
def send(site, variables):
    """Posts an email to two recipients; returns its subject and a function that returns its state."""
    headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}

    def post():
        subject = f"test {uuid.uuid4()}"
        email = {"subject": subject, "text": "Hello.", "to": ["one@example.net", "two@example.net"]}
        answer = requests.post(f"{site}/api/emails", json=email, headers=headers, timeout=5)
        assert answer.status_code == 202, answer.text
        status = f"{site}/api/emails/{answer.json()['id']}"
        return subject, lambda: requests.get(status, headers=headers, timeout=5).json()["state"]

    return post


@pytest.fixture(scope="module")
def playbook(run_playbook):
    """Runs site.yml on the scenario's inventory as an operator does; returns the tasks that changed something."""

    def run(*arguments, **variables):
        done = run_playbook("site.yml", *arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        changed = re.findall(r"^TASK \[([^\]]+)\] \**\n(?:(?!TASK|PLAY).*\n)*?changed: ", done.stdout, re.MULTILINE)
        assert len(changed) == int(re.search(r"changed=(\d+)", done.stdout).group(1)), done.stdout
        return changed

    return run


@pytest.fixture
def systemctl(host):
    def call(arguments):
        with host.sudo():
            return host.check_output(f"systemctl {arguments}")

    return call


def flower_counted(url):
    metrics = requests.get(f"{url(5555)}/metrics", timeout=10).text
    found = re.search(r'flower_events_total\{task="emails\.tasks\.deliver",type="task-succeeded".*?\} ([\d.]+)', metrics)
    return float(found.group(1)) if found else 0.0


def test_email_arrives_and_flower_has_counted_its_tasks(send, inbox, url, eventually):
    before = flower_counted(url)
    subject, state = send()
    eventually(lambda: state() == "sent")
    assert inbox().count(subject) == 2, "expected one mail per recipient"
    eventually(lambda: flower_counted(url) >= before + 2)


@pytest.mark.verify_web
def test_api_and_metrics_refuse_anonymous_users(host, site):
    name = host.ansible("ansible.builtin.debug", "msg={{ django_health_host }}", check=False)["msg"]
    for path in ("api/emails", "metrics"):
        # The header that a proxy adds when it terminates TLS.
        answer = requests.get(
            f"{site}/{path}", headers={"Host": name, "X-Forwarded-Proto": "https"}, timeout=10, allow_redirects=False
        )
        assert answer.status_code == 401, path


@pytest.mark.verify_flower
def test_flower_refuses_anonymous_users(url):
    assert requests.get(f"{url(5555)}/workers", timeout=10).status_code == 401


@pytest.mark.verify_flower
def test_flower_shows_no_secret(url, variables, eventually):
    login = ("flower", variables["secret_flower_password"])

    def workers():
        requests.get(f"{url(5555)}/api/workers?refresh=1", auth=login, timeout=10).raise_for_status()
        return requests.get(f"{url(5555)}/api/workers", auth=login, timeout=10).json()

    found = eventually(lambda: len(workers()) >= 2 and all("conf" in each for each in workers().values()) and workers())
    pages = [requests.get(f"{url(5555)}/worker/{name}", auth=login, timeout=10).text for name in found]
    secrets = [f"secret_rabbitmq_{kind}_password" for kind in ("app", "worker", "beat")]
    for name in (*secrets, "secret_django_key", "secret_app_metrics_token", "secret_postgresql_app_password"):
        assert variables[name] not in str(found) + "".join(pages), name


@pytest.mark.verify_flower
def test_flower_shows_queues(url, variables, eventually):
    """Flower gets the queues from the workers, so this also tests that workers reply to Flower."""

    def queues():
        login = ("flower", variables["secret_flower_password"])
        # Flower inspects the workers at its start and on request. After a reboot, Flower may have started before the workers.
        requests.get(f"{url(5555)}/api/workers?refresh=1", auth=login, timeout=10).raise_for_status()
        answer = requests.get(f"{url(5555)}/api/queues/length", auth=login, timeout=10).json()
        return sorted((queue["name"], queue["messages"]) for queue in answer["active_queues"])

    eventually(lambda: queues() == [("mail.v1", 0), ("maintenance.v1", 0)])


def test_email_accepted_while_the_broker_is_down_arrives(send, inbox, systemctl, eventually):
    systemctl("stop rabbitmq-server")
    subject, state = send()
    assert state() == "queued"
    systemctl("start rabbitmq-server")
    # A worker waits up to half a minute between two attempts to reconnect.
    eventually(lambda: state() == "sent", seconds=90)
    assert inbox().count(subject) == 2


def test_smoke_playbook_sends_one_email_and_finds_failures(host, run_playbook, inbox, systemctl):
    before = len(inbox())
    done = run_playbook("playbooks/smoke.yml", smoke_recipient="one@example.net")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=1 " in done.stdout
    assert len(inbox()) == before + 1
    for unit, sentence in (
        ("mailroom-beat", "Services that are not running: mailroom-beat.service."),
        ("mailroom-worker@maintenance", "do not answer a ping through the broker: maintenance@"),
    ):
        systemctl(f"stop {unit}")
        done = run_playbook("playbooks/smoke.yml")
        systemctl(f"start {unit}")
        assert done.returncode == 2 and sentence in done.stdout, done.stdout + done.stderr


def test_preflight_accepts_the_host_and_finds_provoked_problems(host, run_playbook, systemctl):
    done = run_playbook("playbooks/preflight.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0 " in done.stdout
    limits = {"preflight_disk": {"/srv/not/there": 10**6}, "preflight_clock": 0}
    systemctl("stop mailroom-flower")
    with host.sudo():
        host.check_output("systemd-run --unit=stranger python3 -m http.server --bind 127.0.0.1 5555")
    done = run_playbook(
        "playbooks/preflight.yml", **limits, app_email_url="smtp://127.0.0.1:9", host_package_index_url="http://127.0.0.1:9/"
    )
    systemctl("stop stranger")
    systemctl("start mailroom-flower")
    assert done.returncode == 2
    name = host.backend.get_hostname()
    for sentence in (
        "/srv/not/there has ",
        "The clock differs from the controller's by ",
        "Port 5555 is used by stranger.service. Stop it, or choose another port for one of them.",
        "http://127.0.0.1:9/ does not answer (",
        "The mail server 127.0.0.1:9 does not answer (",
    ):
        assert f"  {name}: {sentence}" in done.stderr + done.stdout, done.stderr
    assert "5 problems:\n" in done.stderr + done.stdout


def test_killed_worker_comes_back(send, inbox, systemctl, eventually):
    systemctl("kill --signal=KILL mailroom-worker@mail")
    subject, state = send()
    eventually(lambda: state() == "sent", seconds=60)
    assert inbox().count(subject) == 2


def test_everything_runs_after_a_reboot(send, inbox, systemctl, reboot, eventually):
    reboot()
    subject, state = eventually(send, seconds=60)
    eventually(lambda: state() == "sent", seconds=90)
    assert inbox().count(subject) == 2
    assert systemctl("list-units --failed --plain --no-legend") == ""


def test_second_run_changes_nothing_after_the_reboot(host, playbook):
    # The fixture `host` keeps the order: pytest runs tests without a host last.
    assert playbook() == []


def test_drift_is_repaired(host, playbook, send, eventually):
    """Manual changes: a stopped service, an edited unit, other passwords, a user with the tag administrator."""
    with host.sudo():
        host.check_output("systemctl disable --now mailroom-beat")
        host.check_output("sed -i s/TimeoutStopSec=.*/TimeoutStopSec=1/ '/etc/systemd/system/mailroom-worker@mail.service'")
        host.check_output("rabbitmqctl -q change_password mailroom another-password")
        host.check_output("rabbitmqctl -q set_user_tags mailroom-flower administrator")
        host.check_output("rabbitmqctl -q change_password admin another-password")
        host.check_output("chmod 0644 /opt/mailroom/current/environment")
    assert playbook() != []
    with host.sudo():
        assert host.service("mailroom-beat").is_running and host.service("mailroom-beat").is_enabled
        assert "TimeoutStopUSec=2min 30s" in host.check_output("systemctl show mailroom-worker@mail")
        assert "mailroom-flower\t[monitoring]" in host.check_output("rabbitmqctl -q list_users")
        assert host.check_output("stat --dereference --format=%a /opt/mailroom/current/environment") == "640"
    _, state = send()
    eventually(lambda: state() == "sent", seconds=60)
    assert playbook() == []


def test_run_does_the_restart_that_a_killed_run_missed(host, playbook, systemctl):
    """A run that was killed between writing a file and the restart leaves processes that are older than their file."""
    units = ("mailroom-web", "mailroom-relay", "mailroom-worker@mail", "mailroom-beat")
    before = [systemctl(f"show --property MainPID --value {unit}") for unit in units]
    with host.sudo():
        host.check_output("touch /opt/mailroom/current/environment")
    assert playbook("--tags", "django,celery") == ["django_celery.stack.services : Manage the units of mailroom/django", *WORKERS]
    after = [systemctl(f"show --property MainPID --value {unit}") for unit in units]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert playbook("--tags", "django,celery") == []


def test_unlisted_worker_is_removed(playbook, systemctl):
    kept = [{"name": "mail", "queues": ["mail.v1", "maintenance.v1"], "time_limit": 120}]
    assert playbook("--tags", "celery", celery_workers=kept) == WORKERS
    assert "maintenance" not in systemctl("list-units --all --plain --no-legend 'mailroom-worker@*'")
    assert playbook("--tags", "celery") == WORKERS
    assert systemctl("is-active mailroom-worker@maintenance") == "active"
