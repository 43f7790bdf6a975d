"""The hosts that an inventory declares for the testbed, and the names derived from it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.machine import TestbedError

CLONE = Path(__file__).resolve().parents[1]
PLATFORMS = Path(__file__).resolve().parent / "images"
MAIL = "mail"  # the mail catcher's name on the network, and the folder of its image
MAIL_PLATFORM = "debian13"  # its base is the published image of this platform's hosts, if they have one
MAIL_SMTP_PORT = 1025
MAIL_WEB_PORT = 1080
MAIL_PORTS = {MAIL_WEB_PORT: 0}  # hosts need no published port for SMTP

HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Host:
    """A declared container: `ports` maps its ports to ports on the loopback, 0 for any free one."""

    name: str
    platform: str
    ports: dict[int, int]
    base_image: str | None = None


@dataclass(frozen=True)
class Inventory:
    """The testbed's part of an Ansible inventory."""

    directory: Path
    hosts: tuple[Host, ...]

    @property
    def stack(self) -> str:
        """The prefix of the names of this inventory's containers, network and keys."""
        return stack_name(CLONE, self.directory)


def stack_name(clone: Path, directory: Path) -> str:
    """Return a name for the inventory `directory` of `clone`, such as tb-1a2b3c-sandbox.

    The hash distinguishes clones; the rest is for readers. `molecule/erlang/inventory` becomes "erlang".
    """
    named = directory.parent if directory.name == "inventory" else directory
    label = re.sub(r"[^a-z0-9]+", "-", named.name.lower()).strip("-")[:30] or "inventory"
    digest = hashlib.sha256(f"{clone}\0{directory}".encode()).hexdigest()[:6]
    return f"tb-{digest}-{label}"


def inventory_directory(name: str) -> Path:
    """Return the absolute path of the inventory `name`, which must be an existing directory."""
    path = Path(name).resolve()
    if not path.is_dir():
        raise TestbedError(f"--inventory {name}: not a directory (the testbed writes variables into it)")
    return path


def read(directory: Path) -> Inventory:
    """Read the inventory in `directory` with ansible-inventory.

    Raise TestbedError when Ansible rejects the inventory or a variable of the testbed is wrong.
    """
    program = Path(sys.executable).with_name("ansible-inventory")
    if not program.exists():
        raise TestbedError(f"{program} not found: run the testbed with the project's .venv/bin/python")
    done = subprocess.run(
        [str(program), "-i", str(directory), "--list"],
        text=True,
        capture_output=True,
        check=False,
        cwd=CLONE,
        # Without this variable, Ansible only warns about a file that is not YAML, and the file's hosts are missing.
        env={**os.environ, "ANSIBLE_INVENTORY_UNPARSED_FAILED": "true"},
    )
    if done.returncode:
        raise TestbedError(f"ansible-inventory rejects {directory}:\n{done.stderr.strip()}")
    return parse(directory, json.loads(done.stdout))


def parse(directory: Path, listing: dict[str, Any]) -> Inventory:
    """Convert the output of `ansible-inventory --list` into an Inventory.

    A mail catcher becomes a host of the platform "mail". Raise TestbedError with the variable and the host for a wrong value, or
    when no host has a platform of the testbed.
    """
    hosts = []
    catchers = set()
    for name, variables in sorted(listing.get("_meta", {}).get("hostvars", {}).items()):
        if variables.get("testbed_platform") is None:
            continue
        platform = os.environ.get("TESTBED_PLATFORM") or variables["testbed_platform"]
        if not HOST_NAME.fullmatch(name):
            raise TestbedError(
                f"{name}: the name of a testbed host must consist of lower-case letters, digits, '-' and '.', so that it resolves"
            )
        if platform not in platforms():
            raise TestbedError(f"{name}: testbed_platform is {platform!r}; allowed: {', '.join(platforms())}")
        ports = _ports(name, "testbed_ports", variables.get("testbed_ports") or {})
        if 22 in ports:
            raise TestbedError(f"{name}: testbed_ports: SSH (22) is always published; leave it out")
        image = variables.get("testbed_image") or os.environ.get(f"TESTBED_IMAGE_{platform.upper().replace('-', '_')}")
        hosts.append(Host(name, platform, {22: 0, **ports}, image))
        if variables.get("testbed_mail_catcher") is True:
            wanted = _ports(name, "testbed_mail_ports", variables.get("testbed_mail_ports") or {})
            catchers.add(tuple(sorted(wanted.items())))
    if not hosts:
        raise TestbedError(f"{directory}: no host has the variable testbed_platform")
    if len(catchers) > 1:
        raise TestbedError("testbed_mail_ports differs between hosts: set it for the group all")
    if catchers:
        if any(host.name == MAIL for host in hosts):
            raise TestbedError(f"a host is called {MAIL}, the mail catcher's name")
        ports = {**MAIL_PORTS, **dict(catchers.pop())}
        # The base of the mail catcher's image is the image of the Debian hosts.
        bases = (host.base_image for host in hosts if host.platform == MAIL_PLATFORM)
        hosts.append(Host(MAIL, MAIL, ports, next(bases, None)))
    return Inventory(directory, tuple(hosts))


def platforms() -> list[str]:
    """Return the platforms that hosts can have."""
    found = (path.parent.name for path in PLATFORMS.glob("*/Containerfile"))
    return sorted(name for name in found if name != MAIL)


def _ports(host: str, variable: str, value: Any) -> dict[int, int]:
    """Check a port mapping. Its keys are strings, because ansible-inventory prints JSON."""
    try:
        ports = {int(inside): int(outside) for inside, outside in dict(value).items()}
    except (TypeError, ValueError):
        ports = {-1: -1}
    if not all(1 <= a <= 65535 and 0 <= b <= 65535 for a, b in ports.items()):
        raise TestbedError(
            f"{host}: {variable} is {value!r}; expected a mapping of ports of the host to ports "
            "on this machine's loopback, 0 for any free one: {8000: 8000, 15672: 0}"
        )
    return ports
