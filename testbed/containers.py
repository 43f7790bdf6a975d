"""Reads and changes single containers through Podman.

Labels name a container's clone and inventory, so that its owner is known even after the deletion of the inventory or the clone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import build, machine, ports
from testbed.inventory import CLONE, MAIL, Host
from testbed.machine import podman

LABEL = "testbed"  # labels are testbed.clone, testbed.inventory, testbed.host, testbed.definition


@dataclass(frozen=True)
class Container:
    """A container of the testbed, from Podman's description."""

    name: str
    host: str
    stack: str
    clone: Path
    inventory: Path
    definition: dict[str, object]
    running: bool
    published: dict[int, int]  # port in the host: port on the machine's loopback

    @property
    def platform(self) -> str:
        """The platform that the host was created with. The inventory may have changed since then."""
        return str(self.definition["image"]).rpartition("/")[2].partition(":")[0]


def containers() -> list[Container]:
    """Return the testbed's containers of all clones on this machine."""
    done = podman("ps", "--all", "--filter", f"label={LABEL}.host", "--format", "json")
    return [_container(entry) for entry in json.loads(done.stdout or "[]")]


def _container(entry: dict[str, Any]) -> Container:
    labels = entry["Labels"]
    published = {}
    for port in entry.get("Ports") or []:
        # Podman merges neighbouring ports into one entry.
        for offset in range(port.get("range") or 1):
            published[port["container_port"] + offset] = port["host_port"] + offset
    return Container(
        name=entry["Names"][0],
        host=labels[f"{LABEL}.host"],
        stack=labels[f"{LABEL}.stack"],
        clone=Path(labels[f"{LABEL}.clone"]),
        inventory=Path(labels[f"{LABEL}.inventory"]),
        definition=json.loads(labels[f"{LABEL}.definition"]),
        running=entry["State"] == "running",
        published=published,
    )


def definition(host: Host) -> dict[str, object]:
    """Return the inputs of a container. A container whose inputs differ from these must be recreated."""
    return {
        "image": build.image_of(host).reference,
        "ports": {str(inside): outside for inside, outside in sorted(host.ports.items())},
        "options": hashlib.sha256(json.dumps(_options(host)).encode()).hexdigest()[:8],
    }


def _options(host: Host) -> list[str]:
    """Return the `podman run` options that differ between hosts and the mail catcher."""
    if host.name == MAIL:
        return ["--systemd=false", *machine.limits()]
    return machine.host_options()


def run_words(stack: str, inventory: Path, host: Host) -> list[str]:
    """Return the arguments of the `podman run` that creates `host` of `inventory`."""
    made_of = definition(host)
    labels = {
        "stack": stack,
        "clone": CLONE,
        "inventory": inventory,
        "host": host.name,
        "definition": json.dumps(made_of),
    }
    words = ["run", "--detach", "--name", f"{stack}-{host.name}", "--hostname", host.name]
    words += ["--network", stack, "--network-alias", host.name]
    for key, value in labels.items():
        words += ["--label", f"{LABEL}.{key}={value}"]
    for inside, outside in sorted(host.ports.items()):
        words += ["--publish", f"127.0.0.1:{outside or ports.choose()}:{inside}"]
    words += [*_options(host), str(made_of["image"])]
    return words + ([] if host.name == MAIL else list(machine.INIT))


def create_network(stack: str, inventory: Path) -> None:
    """Create the network of a stack, unless it exists. The network resolves the hosts' names."""
    if podman("network", "exists", stack, check=False).returncode == 0:
        return
    labels = {"stack": stack, "clone": CLONE, "inventory": inventory}
    words = [word for key, v in labels.items() for word in ("--label", f"{LABEL}.{key}={v}")]
    podman("network", "create", *words, stack)


def networks() -> list[tuple[str, Path, Path]]:
    """Return (stack, clone, inventory) of all networks of the testbed on this machine."""
    done = podman("network", "ls", "--filter", f"label={LABEL}.stack", "--format", "json")
    entries = json.loads(done.stdout or "[]")
    return [
        (
            entry["name"],
            Path(entry["labels"][f"{LABEL}.clone"]),
            Path(entry["labels"][f"{LABEL}.inventory"]),
        )
        for entry in entries
    ]


def remove(name: str) -> None:
    """Remove a container in any state, without waiting for its services to stop."""
    podman("rm", "--force", "--ignore", "--time", "0", "--volumes", name)
