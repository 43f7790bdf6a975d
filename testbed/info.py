"""The variable `testbed_info` of an inventory: the addresses and logins of its services."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from testbed.machine import TestbedError

COLUMNS = ("url", "user", "password")


def read(directory: Path) -> dict[str, dict[str, str]]:
    """Return the inventory's `testbed_info`, templated: a mapping of strings for each service, in the inventory's order."""
    ansible = Path(sys.executable).parent / "ansible"
    show = ("--module-name", "ansible.builtin.debug", "--args", "var=testbed_info")
    done = subprocess.run(
        [ansible, "--inventory", directory, "--limit", "all[0]", *show, "all"],
        env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "ANSIBLE_FORCE_COLOR": "false", "ANSIBLE_NOCOLOR": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    _, arrow, answer = done.stdout.partition("=>")
    info = json.loads(answer).get("testbed_info") if arrow and done.returncode == 0 else None
    if not isinstance(info, list):
        raise TestbedError(f"testbed_info of {directory} can't be read; are its hosts up? {done.stderr.strip()}")
    return {service["name"]: {key: value for key, value in service.items() if key != "name"} for service in info}


def table(info: dict[str, dict[str, str]]) -> str:
    """Return the services as a table; below it, values without a column, one per line."""
    rows = [("", *(column.upper() for column in COLUMNS))]
    rows += [(service.get("title", name), *(service.get(column, "") for column in COLUMNS)) for name, service in info.items()]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for service in info.values():
        lines += [
            f"{service.get('title')}, {key.replace('_', ' ')}: {value}"
            for key, value in service.items()
            if key not in (*COLUMNS, "title")
        ]
    return "\n".join(lines)
