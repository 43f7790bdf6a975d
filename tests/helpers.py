"""Helpers for several tests: the repository's path, a loader for its files, and ansible-playbook with a parsed result."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2

ROOT = Path(__file__).resolve().parents[1]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())


def load(path: str):
    """Loads a Python file of the repository as a module, because plugins and scripts are in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str) -> None:
    """Writes a program that replaces a program that the tested code calls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The program needs no packages, and -S halves its start time.
    path.write_text(f"#!{sys.executable} -S\n{text}")
    path.chmod(0o755)


def common_variables(inventory: Path) -> None:
    """Adds inventories/common and secrets to an inventory in a temporary folder, as in the repository's inventories."""
    everybody = inventory / "group_vars" / "all"
    everybody.mkdir(parents=True)
    (everybody / "00-common").symlink_to(ROOT / "inventories" / "common")
    secrets = [name for name in wiring()["secret_names"]]
    values = {name: f"{MARK}{name.replace('_', '')}" for name in secrets}
    (everybody / "91-secrets.yml").write_text(json.dumps({**values, "secret_certificate_authority": certificate_authority()}))


@functools.cache
def certificate_authority() -> str:
    """The certificate and the key of a certificate authority."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-keyout",
        "-",
        "-subj",
        "/CN=test",
    ]
    parts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("-----BEGIN CERTIFICATE-----")
    return parts[1] + parts[2] + parts[0]


# All secrets in tests have this prefix, so that tests can search the output for secrets.
MARK = "NeverShown0123456789"


def wiring() -> dict:
    import yaml

    return yaml.safe_load((ROOT / "inventories/common/wiring.yml").read_text())


def playbook(*arguments: str | Path, **environment: str) -> tuple[int, dict, str]:
    """Runs ansible-playbook; returns its exit code, parsed result and output."""
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    begin = done.stdout.find("{\n")
    assert begin >= 0, output
    return done.returncode, json.JSONDecoder().raw_decode(done.stdout[begin:])[0], output


ENVIRONMENT = jinja2.Environment(extensions=["jinja2.ext.do"], autoescape=False)  # noqa: S701 - nothing is rendered
# Task keys whose values are expressions without braces.
BARE = {"when", "that", "changed_when", "failed_when", "until", "loop_condition"}


def names_in(value, bare=False):
    """The names of the variables that a YAML value or a template reads."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from names_in(item, key in BARE)
    elif isinstance(value, list):
        for item in value:
            yield from names_in(item, bare)
    elif isinstance(value, str):
        tree = ENVIRONMENT.parse(f"{{{{ {value} }}}}" if bare and "{{" not in value else value)
        yield from (node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "load")
