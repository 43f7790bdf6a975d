"""SSH to the hosts: one key pair per inventory, host keys pinned before the first connection."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from testbed.machine import podman, state_directory

USER = "ansible"

# Runs on the host as root. The private host key never leaves the host. Podman returns the public key, so nobody on the network can
# replace it.
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
    """Return the directory for the files that a stand-in provides to its inventory. Other hosts provide no files."""
    return directory(stack) / "hosts" / host


def private_key(stack: str) -> Path:
    """Return the private key (mode 0600) for all hosts of a stack; create it if needed."""
    path = directory(stack) / "id_ed25519"
    if not path.exists():
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", stack, "-f", str(path)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    return path


def known_hosts(stack: str) -> Path:
    """Return the known_hosts file of a stack."""
    return directory(stack) / "known_hosts"


def introduce(stack: str, container: str) -> str:
    """Authorize the stack's key on a new host; return the host's public key."""
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
    """Return ansible_ssh_common_args without templates, because testinfra evaluates no templates."""
    path = str(known_hosts(stack))
    if " " in path:
        path = f'"{path}"'
    words = {
        "UserKnownHostsFile": path,
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        # A persistent connection to a removed host must not hang for minutes.
        "ServerAliveInterval": "5",
    }
    return " ".join(f"-o '{key}={value}'" if '"' in value else f"-o {key}={value}" for key, value in words.items())


def answers(stack: str, port: int, command: str = "sudo -n true", seconds: int = 3) -> bool:
    """Return whether a host runs `command` over SSH, connected as Ansible connects.

    `seconds` is the timeout of the connection.
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
