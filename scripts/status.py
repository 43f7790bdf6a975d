"""Reports the status of an environment: `python scripts/status.py --env staging [--json] [--drift]`.

Prints the report, and writes it as a page to status/ENV/status.html. The exit code is 0 if the environment is healthy, 1 if it has
warnings, 2 if it has faults, and 3 if the report can't be made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_REPORT = 3


def ansible_playbook(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.run(
        [program, *arguments], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False
    )


def changes(output: str) -> dict[str, list[str]]:
    """Return the tasks per host that would change something, from the JSON output of a run in check mode."""
    run = json.loads(output[output.index("{") :])
    found: dict[str, list[str]] = {host: [] for host in run["stats"]}
    for play in run["plays"]:
        for task in play["tasks"]:
            for host, result in task["hosts"].items():
                if result.get("changed"):
                    found[host].append(task["task"]["name"])
                elif result.get("failed") or result.get("unreachable"):
                    found[host].append(f"{task['task']['name']} (fails)")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Reports the status of an environment.")
    parser.add_argument("--env", required=True, metavar="NAME", help="the environment's directory in inventories/, or a path")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--drift", action="store_true", help="also run site.yml in check mode, and report what it would change")
    options = parser.parse_args()
    inventory = ROOT / "inventories" / options.env
    if not inventory.is_dir():
        parser.error(f"--env is {options.env}; there is no directory {inventory}")
    with tempfile.TemporaryDirectory() as folder:
        extra: list[str | Path] = ["--extra-vars", json.dumps({"status_directory": folder})]
        if options.drift:
            check = ansible_playbook("-i", inventory, "site.yml", "--check", ANSIBLE_STDOUT_CALLBACK="ansible.posix.json")
            extra += ["--extra-vars", json.dumps({"status_drift": changes(check.stdout)})]
        done = ansible_playbook("-i", inventory, "playbooks/ops/status.yml", *extra)
        report = Path(folder, "status.json")
        if not report.exists():
            print(done.stdout, file=sys.stderr)
            return NO_REPORT
        page = ROOT / "status" / inventory.name / "status.html"
        page.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        page.write_bytes(Path(folder, "status.html").read_bytes())
        print(report.read_text() if options.json else Path(folder, "status.txt").read_text())
        if not options.json:
            print(f"The page: {page}")
        code: int = json.loads(report.read_text())["exit_code"]
        return code


if __name__ == "__main__":
    sys.exit(main())
