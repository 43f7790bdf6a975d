"""SSH to the hosts: one key pair for an inventory, host keys pinned before the first contact."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from testbed.machine import podman, state_directory

USER = "ansible"

# Runs in the host as root. The private host key never leaves the host, and its public half comes
# by way of Podman, which nobody else can answer for.
INTRODUCE = f"""
umask 077
cat >/home/{USER}/.ssh/authorized_keys
chown {USER}: /home/{USER}/.ssh/authorized_keys
for _ in $(seq 300); do
    [ -s /etc/ssh/ssh_host_ed25519_key.pub ] && exec cat /etc/ssh/ssh_host_ed25519_key.pub
    sleep 0.1
done
echo 'no host key after 30 s' >&2
exit 1
"""


def directory(stack: str) -> Path:
    """Return the directory of a stack's keys."""
    path = state_directory() / "stacks" / stack
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def host_files(stack: str, host: str) -> Path:
    """Return where the files lie that a stand-in host gives to its inventory; only such a host has the directory."""
    return directory(stack) / "hosts" / host


def private_key(stack: str) -> Path:
    """Return the private key (mode 0600) that opens all hosts of a stack, making it if needed."""
    path = directory(stack) / "id_ed25519"
    if not path.exists():
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", stack, "-f", str(path)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    return path


def known_hosts(stack: str) -> Path:
    """Return the file in which the hosts of a stack are pinned."""
    return directory(stack) / "known_hosts"


def introduce(stack: str, container: str) -> str:
    """Make our key known to a new host and return the host's public key."""
    public = private_key(stack).with_suffix(".pub").read_text()
    done = podman("exec", "--interactive", container, "sh", "-c", INTRODUCE, stdin=public)
    kind, key = done.stdout.split()[:2]
    return f"{kind} {key}"


def pin(stack: str, keys: dict[int, str]) -> None:
    """Write the known_hosts file: {published SSH port: host key}."""
    text = "".join(f"[127.0.0.1]:{port} {key}\n" for port, key in sorted(keys.items()))
    path = known_hosts(stack)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        path.chmod(0o600)


def pinned(stack: str) -> dict[int, str]:
    """Return what `pin` wrote."""
    keys = {}
    with contextlib.suppress(FileNotFoundError):
        for line in known_hosts(stack).read_text().splitlines():
            address, _, key = line.partition(" ")
            keys[int(address.rpartition(":")[2])] = key
    return keys


def common_arguments(stack: str) -> str:
    """Return ansible_ssh_common_args: literal, because testinfra does not template them."""
    path = str(known_hosts(stack))
    if " " in path:
        path = f'"{path}"'
    words = {
        "UserKnownHostsFile": path,
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        # A connection kept open to a host that is gone must not hang for minutes.
        "ServerAliveInterval": "5",
    }
    return " ".join(f"-o '{key}={value}'" if '"' in value else f"-o {key}={value}" for key, value in words.items())


def answers(stack: str, port: int, command: str = "sudo -n true", seconds: int = 3) -> bool:
    """Tell whether a host does `command` over SSH just as Ansible would have it done.

    The connection is given `seconds` to come about.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [
                "ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}",
                "-o", "ControlPath=none", "-o", f"UserKnownHostsFile=\"{known_hosts(stack)}\"",
                "-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes",
                "-i", str(private_key(stack)), "-p", str(port), f"{USER}@127.0.0.1", command,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=seconds + 5,
        )  # fmt: skip
        return done.returncode == 0
    return False
