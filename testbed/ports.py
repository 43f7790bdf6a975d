"""Finds conflicts between the declared loopback ports and the ports in use."""

from __future__ import annotations

import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable

from testbed.inventory import MAIL, Host

# Below the ports that Linux and macOS give to programs that bind port 0. Podman redirects a published port before it
# finds out that a program listens there, and that program's clients are refused meanwhile.
PUBLISHED = range(20000, 32768)


def variable(host: Host) -> str:
    """Return the name of the inventory variable that `host`'s ports come from."""
    return "testbed_mail_ports" if host.name == MAIL else "testbed_ports"


def conflicts(
    hosts: Iterable[Host],
    held: Callable[[Host, int], bool],
    holder: Callable[[int], str | None],
) -> list[str]:
    """Return one line for each declared port that is not available.

    `held(host, port)` returns whether the host's running container already publishes the port; `holder(port)` describes the process
    that listens on it, or returns None.
    """
    lines = []
    promised: dict[int, str] = {}
    for host in hosts:
        for inside, outside in host.ports.items():
            if not outside:
                continue
            asked = f"{host.name}: {variable(host)} maps port {outside} to {inside}"
            if outside in promised:
                lines.append(f"{asked}; {promised[outside]} has the same port")
            elif not held(host, outside):
                user = holder(outside)
                if user:
                    lines.append(f"{asked}, but {user} uses it; free the port or set another one (0 = any)")
            promised.setdefault(outside, host.name)
    return lines


def choose() -> int:
    """Return a free port of PUBLISHED, chosen at random because other processes choose at the same time."""
    while not is_free(port := secrets.choice(PUBLISHED)):
        pass
    return port


def is_free(port: int) -> bool:
    """Return whether `port` on the machine's loopback is free."""
    with socket.socket() as probe:
        # Connections in TIME_WAIT do not occupy the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def listener(port: int) -> str:
    """Describe the process that listens on `port`."""
    if shutil.which("ss"):
        command = ["ss", "-Hltnp", f"sport = :{port}"]
        pattern = r'\(\("([^"]+)",pid=(\d+)'
    elif shutil.which("lsof"):
        command = ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fcp"]
        pattern = r"p(?P<pid>\d+)\nc(?P<name>.+)"
    else:
        return "another program"
    found = re.search(pattern, subprocess.run(command, text=True, capture_output=True, check=False).stdout)
    if not found:
        return "another program, probably of another user"
    name = found.groupdict().get("name") or found[1]
    return f"the program {name} (process {found.groupdict().get('pid') or found[2]})"
