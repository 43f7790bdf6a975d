"""The variables that the testbed writes into an inventory: the addresses of its hosts."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import yaml

from testbed import machine, ssh
from testbed.containers import Container
from testbed.inventory import MAIL, MAIL_SMTP_PORT

HEADER = "# Written by `python -m testbed up`, removed by `down`. Not in git; changes are lost.\n"
GROUP_FILE = "group_vars/all/90-testbed.yml"


def host_file(inventory: Path, host: str) -> Path:
    """Return the path of one host's variables."""
    return inventory / "host_vars" / host / "testbed.yml"


def host_variables(container: Container) -> dict[str, object]:
    """Return the variables that Ansible, testinfra and users need to connect to a host."""
    return {
        "ansible_host": "127.0.0.1",
        "ansible_port": container.published[22],
        "ansible_user": ssh.USER,
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(ssh.private_key(container.stack)),
        "ansible_ssh_common_args": ssh.common_arguments(container.stack),
        "testbed_address": container.host,
        "testbed_ip": _ip(container),
        "testbed_platform": container.platform,
        "testbed_published": _published(container),
        **_said_by_the_host(container),
    }


def _ip(container: Container) -> str:
    """Return a host's IPv4 address in its network. It can change when the host restarts."""
    template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return machine.podman("inspect", "--format", template, container.name).stdout.strip()


def _said_by_the_host(container: Container) -> dict[str, object]:
    """Return a stand-in's variables about its local repositories, and the folder with the files that they name."""
    files = ssh.host_files(container.stack, container.host)
    try:
        said = yaml.safe_load((files / "variables.yml").read_text())
    except FileNotFoundError:
        return {}
    return {"testbed_files": str(files), **said}


def group_variables(mail: Container | None) -> dict[str, object]:
    """Return the variables of all hosts of an inventory."""
    variables: dict[str, object] = {"testbed_ca_certificates": [str(path) for path in machine.extra_ca_certificates()]}
    if mail:
        variables["testbed_mail_host"] = MAIL
        variables["testbed_mail_smtp_port"] = MAIL_SMTP_PORT
        variables["testbed_mail_published"] = _published(mail)
    return variables


def _published(container: Container) -> dict[str, int]:
    return {str(inside): out for inside, out in sorted(container.published.items()) if inside != 22}


def write(inventory: Path, containers: list[Container]) -> list[Path]:
    """Write the variables (mode 0600); return the files that changed."""
    mail = next((each for each in containers if each.host == MAIL), None)
    wanted = {inventory / GROUP_FILE: group_variables(mail)}
    for container in containers:
        if container is not mail:
            wanted[host_file(inventory, container.host)] = host_variables(container)
    changed = []
    for path, variables in wanted.items():
        text = HEADER + yaml.safe_dump(variables, sort_keys=False, width=1000)
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() == text:
                continue
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file is replaced atomically, because Ansible may be reading it.
        draft = path.with_name(f".{path.name}.{os.getpid()}~")
        draft.write_text(text)
        draft.chmod(0o600)
        draft.replace(path)
        changed.append(path)
    return changed


def remove(inventory: Path, host: str | None = None) -> None:
    """Remove the variables of `host`, or all that the testbed wrote into `inventory`."""
    files = [inventory / GROUP_FILE, *inventory.glob("host_vars/*/testbed.yml")]
    for path in files if host is None else [host_file(inventory, host)]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        # Directories that become empty are removed too.
        for parent in (path.parent, path.parent.parent):
            with contextlib.suppress(OSError):
                parent.rmdir()
