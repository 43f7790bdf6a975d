"""Creates, converges, accesses and removes the brokers of the benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[1]
# By the number of nodes.
INVENTORIES = {1: PROJECT / "bench" / "broker", 3: PROJECT / "bench" / "cluster"}
BIN = PROJECT / ".venv" / "bin"
HOST = "bench1"
VHOST = "mailroom"


class Environment:
    """The inventory in use, which `broker` sets."""

    inventory = INVENTORIES[1]


def say(text: str) -> None:
    print(text, flush=True)


def run(*words: object, check: bool = True, **more) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine; if `check` and it fails, print its output and exit."""
    done = subprocess.run([*map(str, words)], cwd=PROJECT, capture_output=True, text=True, check=False, **more)
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return done


def testbed(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(BIN / "python", "-m", "testbed", words[0], "--inventory", Environment.inventory, *words[1:], check=check)


def on_host(script: str, host: str = HOST, check: bool = True) -> str:
    """Run a shell script on a host as root; return its output."""
    return testbed("exec", host, "--", "sh", "-c", script, check=check).stdout.strip()


def playbook(path: str, *words: object, **variables: object) -> dict:
    """Run a playbook; return its duration in seconds, and the tasks and changes of the first host."""
    extra = ["--extra-vars", json.dumps(variables)] if variables else []
    begin = time.monotonic()
    environment = {**os.environ, "ANSIBLE_FORCE_COLOR": "false"}
    done = run(BIN / "ansible-playbook", "-i", Environment.inventory, path, *words, *extra, env=environment)
    seconds = time.monotonic() - begin
    ok, changed = map(int, re.search(r"ok=(\d+)\s+changed=(\d+)", done.stdout).groups())
    return {"seconds": seconds, "tasks": ok, "changed": changed}


@contextlib.contextmanager
def broker(keep: bool, nodes: int = 1) -> Iterator[None]:
    """Hosts on which the role has installed one broker, or a cluster."""
    Environment.inventory = INVENTORIES[nodes]
    say("creating a host with a broker" if nodes == 1 else f"creating {nodes} hosts with a cluster")
    testbed("up")
    try:
        run(BIN / "ansible-playbook", "-i", Environment.inventory, "playbooks/ops/create_secrets.yml")
        playbook("playbooks/base.yml")
        playbook("playbooks/broker.yml")
        yield
    finally:
        if not keep:
            testbed("down")
            secrets().unlink(missing_ok=True)


def secrets() -> Path:
    return Environment.inventory / "group_vars" / "all" / "91-secrets.yml"


def secret(name: str) -> str:
    return yaml.safe_load(secrets().read_text())[f"secret_{name}"]


def published(port: int, host: str = HOST) -> int:
    found = yaml.safe_load((Environment.inventory / "host_vars" / host / "testbed.yml").read_text())
    return found["testbed_published"][str(port)]
