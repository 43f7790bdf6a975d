"""Creates environments on empty hosts, only with the command of docs/new-environment.md and the commands that it prints."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[3]
HOSTS = ("server1", "server2", "server3")


def ssh_configuration(host):
    """Returns the SSH configuration of a person who can log in to the hosts: names, ports, the key, and the hosts' keys."""
    blocks = []
    for name in HOSTS:
        variables = host.get_host(f"ansible://{name}").ansible.get_variables()
        options = shlex.split(variables["ansible_ssh_common_args"])[1::2]
        blocks += [
            f"Host {name}",
            "HostName 127.0.0.1",
            f"Port {variables['ansible_port']}",
            f"User {variables['ansible_user']}",
            f"IdentityFile {variables['ansible_ssh_private_key_file']}",
            *(option.replace("=", " ", 1) for option in options),
        ]
    return "\n".join(blocks) + "\n"


class Person:
    """Types commands in the repository's directory. Has a separate home directory."""

    def __init__(self, home, host):
        # ssh does not use HOME, so this program passes the person's configuration to it.
        (home / "ssh_config").write_text(ssh_configuration(host))
        program = home / "bin" / "ssh"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {home}/ssh_config "$@"\n')
        program.chmod(0o755)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "MOLECULE_", "MAKE"))
        }
        self.environment |= {"HOME": str(home), "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def run(self, command, check=True):
        """Run a command without a terminal; return its output."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=PROJECT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def home():
    # SSH's control sockets are below the home directory, and the path of a socket must be short. The path of tmp_path is too long.
    with tempfile.TemporaryDirectory(prefix="environment-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def person(home, host):
    return Person(home, host)


TOPOLOGIES = {
    "molecule-one-host": "HOST=server1",
    "molecule-two-hosts": "HOSTS='broker=server2 database=server2 web=server3 workers=server2,server3 flower=server2'",
}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def environment(request, person, variables):
    """The name of an environment that exists, and the output of the command that created it. Removes its files afterwards."""
    folder = PROJECT / "inventories" / request.param
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    mail = f"smtp://{variables['testbed_mail_host']}:{variables['testbed_mail_smtp_port']}"
    output = person.run(f"make environment NAME={request.param} {TOPOLOGIES[request.param]} DOMAIN=mail.example.org MAIL={mail}")
    seconds = time.monotonic() - began
    # Only a machine on which somebody has added certificate authorities needs this file.
    if files := variables["testbed_ca_certificates"]:
        path = folder / "group_vars/all/40-authorities.yml"
        path.write_text(yaml.safe_dump({"ca_certificates_files": files}, explicit_start=True))
    yield request.param, output, seconds
    shutil.rmtree(folder)
    shutil.rmtree(PROJECT / "status" / request.param, ignore_errors=True)


@pytest.fixture(scope="module")
def installed(environment, person, variables):
    """The environment's name, and the outputs of preflight.yml, site.yml and smoke.yml."""
    name, output, seconds = environment
    commands = re.findall(r"^  (\.venv/bin/ansible-playbook .*)$", output, re.MULTILINE)
    assert [Path(command.split()[3]).name for command in commands] == ["preflight.yml", "site.yml", "smoke.yml"]
    began = time.monotonic()
    outputs = [person.run(command) for command in commands]
    return name, outputs, seconds + time.monotonic() - began, 1 + len(commands)


def recap(output):
    """Returns the counters of Ansible's recap per host."""
    lines = output.rpartition("PLAY RECAP")[2].splitlines()
    return {line.split()[0]: dict(each.split("=") for each in line.split()[2:]) for line in lines if " : " in line}


# The quick part of preflight.yml, on empty hosts


def test_site_refuses_a_new_host_before_it_changes_anything(environment, person, on):
    name = environment[0]
    host = "server2" if "two" in name else "server1"
    on(host, "systemd-run --unit=stranger python3 -m http.server --bind 127.0.0.1 5555")
    try:
        output = person.run(f".venv/bin/ansible-playbook -i inventories/{name} site.yml -e host_platform=ubuntu2404", check=False)
    finally:
        on(host, "systemctl stop stranger")
    for sentence in (
        "The host has Debian 13, and host_platform is ubuntu2404. Set host_platform to debian13.",
        "Port 5555 is used by stranger.service. Stop it, or choose another port for one of them.",
    ):
        assert f"  {host}: {sentence}" in output, output
    assert {count["changed"] for count in recap(output).values()} == {"0"}


def test_site_stops_before_it_changes_anything_if_a_host_does_not_answer(environment, person):
    name = environment[0]
    file = PROJECT / f"inventories/{name}/host_vars/{'server3' if 'two' in name else 'server1'}.yml"
    file.parent.mkdir()
    file.write_text("---\nansible_port: 1\n")
    try:
        output = person.run(f".venv/bin/ansible-playbook -i inventories/{name} site.yml", check=False)
    finally:
        shutil.rmtree(file.parent)
    assert f"1 problem:\n  {file.stem}: Ansible can't connect: " in output, output
    assert {count["changed"] for count in recap(output).values()} == {"0"}


def test_site_inspects_a_host_only_once(environment, person):
    """With a tag that no task has, site.yml changes nothing else."""
    command = f".venv/bin/ansible-playbook -i inventories/{environment[0]} site.yml --tags none"
    first, second = person.run(command), person.run(command)
    assert "Look for problems" in first and {count["changed"] for count in recap(first).values()} == {"1"}, first
    assert "Look for problems" not in second and {count["changed"] for count in recap(second).values()} == {"0"}, second


# The commands of the document


def test_first_email_arrives_after_four_commands(installed, inbox, capsys):
    name, _, seconds, commands = installed
    web = "server3" if "two" in name else "server1"
    assert inbox().count(f"Test of mailroom on {web}") == 1
    assert commands == 4
    with capsys.disabled():
        print(f"\n{name}: {commands} commands and {seconds / 60:.1f} minutes to the first email")


def test_verify_passes(installed, person):
    output = person.run(f"make verify ENV={installed[0]}")
    assert re.findall(r"(\d+) passed", output) == ["1", "3"], output
    assert "failed" not in output and "skipped" not in output, output


def test_status_has_no_fault_and_asks_for_backups(installed, person):
    host = "server2" if "two" in installed[0] else "server1"
    # make fails if there are warnings.
    output = person.run(f"make status ENV={installed[0]}", check=False)
    assert re.findall(r"^  (FAULT|WARNING) +(.+)$", output, re.MULTILINE) == [
        ("WARNING", f"{host}: There is no backup definitions.json."),
        ("WARNING", f"{host}: There is no backup mailroom.pgc."),
    ], output


def test_secret_can_be_read_as_printed(environment, installed, person):
    (command,) = re.findall(r"^  (\.venv/bin/ansible -i .*)$", environment[1], re.MULTILINE)
    (password,) = re.findall(r'"secret_app_admin_password": "(.+)"', person.run(command))
    assert len(password) > 20


def test_second_run_changes_nothing(installed, person):
    output = person.run(f".venv/bin/ansible-playbook -i inventories/{installed[0]} site.yml")
    counts = recap(output)
    assert {host: count["changed"] for host, count in counts.items()} == dict.fromkeys(counts, "0")
    assert len(counts) == (2 if "two" in installed[0] else 1)
    # The first run has inspected the hosts.
    assert "Look for problems" not in output, output


def test_creation_can_be_repeated(installed, person):
    output = person.run(f"make environment NAME={installed[0]}")
    assert not re.findall(r"^(?:created|extended) .*$", output, re.MULTILINE), output
