"""Tests the playbooks for operations on an environment with two hosts of the application behind a proxy."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import requests

SCENARIO = Path(__file__).resolve().parents[1]
OPS = "playbooks/ops"


def inventories(name):
    """Returns the options for the scenario's inventories and another one."""
    return [word for path in (*os.environ["ANSIBLE_INVENTORY"].split(","), SCENARIO / name) for word in ("-i", str(path))]


@pytest.fixture
def drain(run_playbook):
    def run(name, **variables):
        return run_playbook(f"{OPS}/drain.yml", "--limit", "all", host=name, **variables)

    return run


@pytest.fixture
def proxy(host):
    """The proxy's base URL on this machine."""
    variables = host.get_host("ansible://mq1").ansible.get_variables()
    return f"http://127.0.0.1:{variables['testbed_published']['80']}"


def recap(done):
    """Returns the counters per host in Ansible's recap."""
    lines = done.stdout.rpartition("PLAY RECAP")[2].splitlines()
    return {line.split()[0]: dict(each.split("=") for each in line.split()[2:]) for line in lines if " : " in line}


# Status


def test_status_of_a_running_environment(status, send, eventually):
    _, state = send()
    eventually(lambda: state() == "sent")
    code, report, output = status()
    assert [finding for finding in report["findings"] if finding["level"] == "fault"] == [], output
    assert code == 0
    hosts = {each["name"]: each["status"] for each in report["hosts"]}
    assert {unit["name"] for unit in hosts["web1"]["units"]} == {
        "mailroom-web.service",
        "mailroom-relay.service",
        "mailroom-worker@mail.service",
        "mailroom-worker@maintenance.service",
        "mailroom-beat.service",
    }
    assert {"nginx.service", "rabbitmq-server.service", "postgresql@17-main.service", "mailroom-flower.service"} == {
        unit["name"] for unit in hosts["mq1"]["units"]
    }
    assert set(hosts["mq1"]["versions"]) == {"nginx", "PostgreSQL"} and set(hosts["mq1"]["broker"]["versions"]) == {
        "RabbitMQ",
        "Erlang",
    }
    assert set(hosts["web2"]["versions"]) == {"release", "Python", "Django", "Celery"}
    assert report["application"]["states"]["sent"] >= 1
    queues = {queue["name"]: queue for queue in report["broker"]["queues"]}
    assert queues["mail.v1"]["consumers"] == 2 and queues["mail.v1"]["leader"] == "rabbit@mq1"


def test_status_changes_nothing_on_the_hosts_and_shows_no_secret(run_playbook, environment_secrets, tmp_path):
    done = run_playbook(f"{OPS}/status.yml", "--limit", "all", "-vvv", status_directory=str(tmp_path))
    found = recap(done)
    # The first host writes the report to the controller.
    assert {name: each["changed"] for name, each in found.items()} == {
        "mq1": found["mq1"]["changed"],
        "web1": "0",
        "web2": "0",
        "new1": "0",
    }
    texts = done.stdout + "".join(path.read_text() for path in tmp_path.iterdir())
    assert [name for name, value in environment_secrets.items() if value in texts] == []


def test_status_names_stopped_services_and_silent_hosts(status, on):
    on("web2", "systemctl stop mailroom-relay")
    try:
        code, report, output = status(*inventories("silent"))
    finally:
        on("web2", "systemctl start mailroom-relay")
    assert code == 2
    faults = {(each["host"], each["text"]) for each in report["findings"] if each["level"] == "fault"}
    assert ("web2", "mailroom-relay.service is inactive. Its log: journalctl -u mailroom-relay.service") in faults, output
    assert [text for name, text in faults if name == "silent1" and text.startswith("Ansible can't connect: ")], output
    assert {name for name, _ in faults} == {"web2", "silent1"}


# Drain


def test_no_request_fails_while_a_host_is_drained_and_returns(drain, proxy, variables, on, eventually, status):
    headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}
    email = {"subject": "drain", "text": "Hello.", "to": ["one@example.net"]}
    answers, ended = [], threading.Event()

    def post():
        while not ended.is_set():
            try:
                answer = requests.post(f"{proxy}/api/emails", json=email, headers=headers, timeout=20)
                answers.append((answer.status_code, answer.json().get("id")))
            except requests.RequestException as error:
                answers.append((str(error), None))
            time.sleep(0.1)

    thread = threading.Thread(target=post)
    thread.start()
    try:
        done = drain("web2")
        assert done.returncode == 0, done.stdout
        stopped = on("web2", "systemctl list-units --plain --no-legend --state=active 'mailroom*'")
        enabled = on("web2", "systemctl is-enabled mailroom.target || true")
        files = on("mq1", "ls /etc/nginx/mailroom-control")
        again = drain("web2")
        last = drain("web1")
        drained = status()[1]
        back = drain("web2", undrain=True)
        assert back.returncode == 0, back.stdout
    finally:
        ended.set()
        thread.join()
    assert (stopped, enabled, files) == ("", "disabled", "web2:8000")
    assert on("mq1", "ls /etc/nginx/mailroom-control") == ""
    assert last.returncode != 0
    assert "web1 is the last web host that gets requests. Other web hosts are drained: web2." in last.stdout, last.stdout
    assert recap(again)["web2"]["changed"] == "0"
    assert {"fault"} == {each["level"] for each in drained["findings"] if each["host"] == "web2"}
    assert recap(drain("web2", undrain=True))["web2"]["changed"] == "0"
    assert len(answers) > 50 and {code for code, _ in answers} == {202}, answers

    def all_sent():
        states = [requests.get(f"{proxy}/api/emails/{each}", headers=headers, timeout=10).json()["state"] for _, each in answers]
        return set(states) == {"sent"}

    eventually(all_sent, seconds=60)


# A new host


def test_new_host_without_the_hosts_that_must_accept_it_is_refused(run_playbook, on):
    done = run_playbook("playbooks/app.yml", *inventories("grown"), "--limit", "new1")
    assert done.returncode != 0
    assert "new1 has no release yet, and the limit excludes mq1." in done.stdout, done.stdout
    assert on("new1", "ls -d /opt/mailroom || true") == ""
