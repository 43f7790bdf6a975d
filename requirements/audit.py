"""Looks for known vulnerabilities in all locks with pip-audit. Fails if it finds one that exceptions.yml does not list."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = ROOT / "requirements" / "exceptions.yml"
FIELDS = {"id": str, "package": str, "until": datetime.date, "reason": str}


class Wrong(Exception):
    """An invalid entry in exceptions.yml. The text names the entry and the reason."""


def locks() -> list[Path]:
    """Return all files with pinned packages, relative to the repository."""
    patterns = ("requirements/*.txt", "app/requirements*.txt", "roles/*/files/*.txt")
    return sorted(path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))


def accepted(entries: object, today: datetime.date) -> list[str]:
    """Return the ids of the vulnerabilities that exceptions.yml accepts today."""
    if not isinstance(entries, list):
        raise Wrong("exceptions.yml is not a list.")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise Wrong(f"Exception {number} must have exactly these fields: {', '.join(FIELDS)}.")
        for name, kind in FIELDS.items():
            if not isinstance(entry[name], kind) or not entry[name]:
                raise Wrong(f"Exception {number} has no valid {name}.")
        if entry["until"] < today:
            raise Wrong(
                f"The exception for {entry['id']} ended on {entry['until']}: update {entry['package']}, or review the exception."
            )
    return [entry["id"] for entry in entries]


def command(lock: Path, ignored: Iterable[str]) -> list[str]:
    words = [
        str(Path(sys.executable).with_name("pip-audit")),
        "--strict",
        "--disable-pip",
        "--require-hashes",
        "--requirement",
        str(lock),
    ]
    return words + [word for identifier in ignored for word in ("--ignore-vuln", identifier)]


def main() -> int:
    try:
        ignored = accepted(yaml.safe_load(EXCEPTIONS.read_text(encoding="utf-8")), datetime.date.today())
    except Wrong as error:
        print(error, file=sys.stderr)
        return 1
    failed = []
    for lock in locks():
        print(f"== {lock}", flush=True)
        if subprocess.run(command(lock, ignored), cwd=ROOT, check=False).returncode:
            failed.append(str(lock))
    if failed:
        print(f"Vulnerable, or not checked: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
