"""Creates, converges, accesses and removes the hosts of the benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
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
FOLDER = PROJECT / ".ansible" / "bench"
HOST = "bench1"
VHOST = "mailroom"


class Environment:
    """The inventory in use."""

    inventory = INVENTORIES[1]


def say(text: str) -> None:
    print(text, flush=True)


def run(*words: object, check: bool = True, **more) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine. If it fails and `check` is true, print its output and exit."""
    done = subprocess.run([*map(str, words)], cwd=PROJECT, capture_output=True, text=True, check=False, **more)
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return done


def testbed(*words: object, **more) -> subprocess.CompletedProcess[str]:
    return run(BIN / "python", "-m", "testbed", words[0], "--inventory", Environment.inventory, *words[1:], **more)


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


def write_inventory(name: str, groups: dict, **variables: object) -> Path:
    """Write an inventory for testbed/, with a mail catcher, in .ansible/bench."""
    inventory = FOLDER / name
    shutil.rmtree(inventory, ignore_errors=True)
    files = inventory / "group_vars" / "all"
    files.mkdir(parents=True)
    (files / "00-common").symlink_to(PROJECT / "inventories" / "common")
    (files / "20-testbed.yml").symlink_to(PROJECT / "testbed" / "vars.yml")
    (files / "21-mailroom.yml").symlink_to(PROJECT / "testbed" / "mailroom.yml")
    own = {"testbed_platform": "debian13", "testbed_mail_catcher": True} | variables
    (files / "30-bench.yml").write_text(yaml.safe_dump(own))
    (inventory / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": groups}}))
    return inventory


def by_hand() -> float:
    """Run bench/hand-typed.sh on a separate host; return its duration in seconds."""
    before, Environment.inventory = Environment.inventory, write_inventory("hand", {"hand": {"hosts": {"hand": None}}})
    testbed("up")
    try:
        for path in generated().get("testbed_ca_certificates", []):
            name = f"/usr/local/share/ca-certificates/{Path(path).stem}.crt"
            script = f"mkdir -p {Path(name).parent} && cat >{name}"
            testbed("exec", "hand", "--", "sh", "-c", script, input=Path(path).read_text())
        begin = time.monotonic()
        done = testbed("exec", "hand", "--", "bash", input=(PROJECT / "bench" / "hand-typed.sh").read_text())
        seconds = time.monotonic() - begin
        say("  " + ", ".join(done.stdout.split("\n")[:-2]))
        return seconds
    finally:
        testbed("down")
        Environment.inventory = before


def generated(host: str | None = None) -> dict:
    """The variables that testbed/ wrote for a host, or for all hosts."""
    path = f"host_vars/{host}/testbed.yml" if host else "group_vars/all/90-testbed.yml"
    return yaml.safe_load((Environment.inventory / path).read_text())


def secrets() -> Path:
    return Environment.inventory / "group_vars" / "all" / "91-secrets.yml"


def secret(name: str) -> str:
    return yaml.safe_load(secrets().read_text())[f"secret_{name}"]


def published(port: int, host: str = HOST) -> int:
    return generated(host)["testbed_published"][str(port)]
