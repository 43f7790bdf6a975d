"""Fixtures for the scenarios' tests. If a test fails, its report gets the host's journal."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import requests

PROJECT = Path(__file__).resolve().parents[1]
UNITS = "--unit='rabbitmq-server*' --unit='postgresql*' --unit='mailroom*' --unit='shop*' --unit='example*'"


@pytest.fixture(scope="module")
def variables(host):
    """The host's inventory variables without templating, so tests can use only literal values, such as secrets."""
    return host.ansible.get_variables()


@pytest.fixture(scope="module")
def environment_secrets(variables):
    """The environment's secrets by name. Outside of a rotation, there are no old values, and their variables are empty."""
    return {name: value for name, value in variables.items() if name.startswith("secret_") and name != "secret_names" and value}


@pytest.fixture(scope="module")
def forwarded(host, variables):
    """Opens an SSH tunnel to a port on the host's loopback address; returns the port on this machine."""
    with contextlib.ExitStack() as stack:
        yield lambda port: stack.enter_context(tunnel(host, variables, port))


@pytest.fixture(scope="module")
def published(variables, forwarded):
    """Returns the loopback port on which a port of the host is published. If it is not published, opens an SSH tunnel to it."""

    def port_here(port):
        ports = variables.get("testbed_published", {})
        return ports[str(port)] if str(port) in ports else forwarded(port)

    return port_here


@contextlib.contextmanager
def tunnel(host, variables, port):
    """Forwards a free port of this machine to a port on the host's loopback address, with Ansible's connection variables."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    words = shlex.split(variables.get("ansible_ssh_common_args", ""))
    for option, name in (("-p", "ansible_port"), ("-l", "ansible_user"), ("-i", "ansible_ssh_private_key_file")):
        words += [option, str(variables[name])] if name in variables else []
    words += ["-o", "ExitOnForwardFailure=yes", "-N", "-L", f"127.0.0.1:{free}:127.0.0.1:{port}"]
    with subprocess.Popen(["ssh", *words, variables.get("ansible_host", host.backend.get_hostname())]) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", free)):
                    break
                assert process.poll() is None, "ssh ended"
                time.sleep(0.1)
            else:
                pytest.fail(f"ssh forwards no port to {port} after 10 s")
            yield free
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def url(published):
    """Returns the base URL of a port of the host."""
    return lambda port: f"http://127.0.0.1:{published(port)}"


@pytest.fixture(scope="module")
def site(url):
    """The application's base URL on this machine."""
    return url(8000)


@pytest.fixture(scope="module")
def api(url, variables):
    """Calls the broker's management API, by default as the administrator; returns the parsed response."""
    administrator = ("admin", variables["secret_rabbitmq_administrator_password"])

    def ask(path, method="GET", auth=administrator, **more):
        response = requests.request(method, f"{url(15672)}/api/{path}", auth=auth, timeout=30, **more)
        response.raise_for_status()
        return response.json() if response.content else None

    return ask


@pytest.fixture(scope="module")
def inbox(variables):
    """Returns the subjects of all mails in the mail catcher."""
    port = variables["testbed_mail_published"]["1080"]

    def subjects():
        mails = requests.get(f"http://127.0.0.1:{port}/api/email", timeout=10).json()
        return [mail["subject"] for mail in (mails["emails"] if isinstance(mails, dict) else mails)]

    return subjects


@pytest.fixture
def reboot(host):
    """Reboots the host and waits until it responds."""
    # Scenarios can share tests, so the path of this file is not always the scenario's.
    inventory = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "inventory")

    def restart():
        words = ["restart", "--inventory", inventory, host.backend.get_hostname()]
        subprocess.run([sys.executable, "-m", "testbed", *words], cwd=PROJECT, check=True, capture_output=True)

    return restart


@pytest.fixture(scope="module")
def run_playbook(host):
    """Runs a playbook on the scenario's host with extra variables; returns the finished process.

    Molecule sets ANSIBLE_INVENTORY to the scenario's inventories.
    """

    def run(playbook, *arguments, **variables):
        words = [playbook, "--limit", host.backend.get_hostname(), "--extra-vars", json.dumps(variables), *arguments]
        return subprocess.run(
            [Path(sys.executable).parent / "ansible-playbook", *words],
            cwd=PROJECT,
            env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def status(run_playbook, tmp_path):
    """Runs status.yml; returns its exit code, its report, and its output."""

    def read(*arguments):
        done = run_playbook("playbooks/ops/status.yml", "--limit", "all", *arguments, status_directory=str(tmp_path))
        assert (tmp_path / "status.json").exists(), done.stdout
        assert (tmp_path / "status.html").read_text().startswith("<!doctype html>")
        return done.returncode, json.loads((tmp_path / "status.json").read_text()), done.stdout

    return read


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


@pytest.fixture
def traffic(published):
    """About 20 requests per second to a port of the host during a with block, half of them on connections that the clients keep.

    Returns the durations of the requests, and the errors.
    """

    @contextlib.contextmanager
    def send(port):
        durations, errors, ended = [], [], threading.Event()

        def client(keep):
            connection = http.client.HTTPConnection("127.0.0.1", published(port), timeout=20)
            while not ended.wait(0.4):
                begin = time.monotonic()
                try:
                    connection.request("GET", "/healthz")
                    answer = connection.getresponse()
                    answer.read()
                    if answer.status != 200:
                        errors.append(answer.status)
                except (OSError, http.client.HTTPException) as error:
                    errors.append(repr(error))
                    connection.close()
                durations.append(time.monotonic() - begin)
                if not keep:
                    connection.close()

        threads = [threading.Thread(target=client, args=(number % 2 == 0,)) for number in range(8)]
        for thread in threads:
            thread.start()
        try:
            yield durations, errors
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    return send


@pytest.fixture(scope="module")
def exposure(host):
    """Returns systemd's rating of a running unit: 0 (confined) to 10 (unsafe)."""

    def rate(unit):
        with host.sudo():
            assert host.service(unit).is_running
            table = host.check_output(f"systemd-analyze security --no-pager {unit}")
        return float(table.split("Overall exposure level for ")[1].split()[1])

    return rate


@pytest.fixture(scope="module")
def inside(host):
    """Runs a command as a user in the mount namespace of a unit's main process; returns testinfra's result."""

    def run(unit, user, command):
        with host.sudo():
            pid = host.check_output(f"systemctl show --property=MainPID --value {unit}")
            return host.run(f"nsenter --mount --target {pid} runuser -u {user} -- {command}")

    return run


@pytest.fixture
def send(site, variables):
    """Posts an email; returns its subject and a function that returns its state."""
    headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}

    def post():
        subject = f"test {uuid.uuid4()}"
        email = {"subject": subject, "text": "Hello.", "to": ["one@example.net"]}
        answer = requests.post(f"{site}/api/emails", json=email, headers=headers, timeout=10)
        assert answer.status_code == 202, answer.text
        status = f"{site}/api/emails/{answer.json()['id']}"
        return subject, lambda: requests.get(status, headers=headers, timeout=10).json()["state"]

    return post


@pytest.fixture
def root(host):
    """Runs a command as root; returns testinfra's result."""

    def run(command):
        with host.sudo():
            return host.run(command)

    return run


@pytest.fixture
def on(host):
    """Runs a command as root on the host with this name; returns its output."""

    def run(name, command):
        other = host.get_host(f"ansible://{name}")
        with other.sudo():
            return other.check_output(command)

    return run


@pytest.fixture(scope="module")
def is_el(host):
    """Whether the host belongs to the Red Hat family."""
    return host.exists("dnf")


@pytest.fixture
def eventually():
    """Repeats a check until it neither raises nor returns a false value; after `seconds`, fails with its last error."""

    def check_until(check, seconds=30):
        until = time.monotonic() + seconds
        while True:
            try:
                result = check()
                assert result, f"still {result!r} after {seconds} s"
                return result
            except (AssertionError, requests.RequestException, OSError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    return check_until


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Add the logs of the host's services to the report of a failed test."""
    report = (yield).get_result()
    if report.when == "call" and report.failed and "host" in item.funcargs:
        host = item.funcargs["host"]
        with host.sudo():
            done = host.run(f"journalctl --no-pager --lines=60 --output=short-iso {UNITS}")
        if done.rc:
            done = host.run(
                "tail -n 20 ~/Library/Logs/rabbitmq/*.log ~/Library/Logs/postgresql/*.log ~/Library/Logs/mailroom/*/*.log"
            )
        report.sections.append(("journal of the host", done.stdout))
