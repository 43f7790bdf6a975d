"""Runs targets of the Makefile in parallel and prints a table of the results: `python tests/parts.py [--jobs N] TARGET...`

If a target passes, the script prints one line. If it fails, the script prints its whole output. All logs stay in .logs/.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".logs"
PROGRESS = 60  # seconds between two progress lines

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# pytest's last line; a failed test in pytest's short summary, or a failed Ansible task.
COUNTS = re.compile(r"^=+ (.*\b(?:passed|failed|errors?)\b.*) in [0-9.]+s.*=+$", re.MULTILINE)
FAULTS = re.compile(r"^(?:FAILED|ERROR|fatal:) .*$", re.MULTILINE)


@dataclass
class Part:
    """The result of a target: its exit status and duration."""

    target: str
    status: int
    seconds: float

    @property
    def log(self) -> Path:
        return LOGS / f"{self.target}.log"

    def text(self) -> str:
        return COLOUR.sub("", self.log.read_text(errors="replace"))

    def line(self) -> str:
        """The result as a line of the table."""
        counts = ", then ".join(COUNTS.findall(self.text()))
        return f"{'ok' if self.status == 0 else 'FAILED':<8}{duration(self.seconds):>12}  {self.target:<26}{counts}".rstrip()


def duration(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02} s"


class Runner:
    """Runs up to `jobs` targets in parallel and prints progress."""

    def __init__(self, targets: list[str], jobs: int) -> None:
        self.targets = targets
        self.jobs = jobs
        self.began: dict[str, float] = {}
        self.ended: list[Part] = []
        self.lock = threading.Lock()

    def run_one(self, target: str) -> Part:
        start = time.monotonic()
        with self.lock:
            self.began[target] = start
            print(f"{target}: started", flush=True)
        with (LOGS / f"{target}.log").open("wb") as log:
            done = subprocess.run(
                ["make", "--no-print-directory", target],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        part = Part(target, done.returncode, time.monotonic() - start)
        with self.lock:
            del self.began[target]
            self.ended.append(part)
            if part.status:
                print(f"---- {target}: output ----\n{part.log.read_text(errors='replace')}---- {target} ----")
            print(part.line(), flush=True)
        return part

    def progress(self) -> None:
        """Prints the running targets with their durations, and how many are waiting and done."""
        with self.lock:
            now = time.monotonic()
            running = ", ".join(f"{target} ({duration(now - since)})" for target, since in self.began.items())
            waiting = len(self.targets) - len(self.began) - len(self.ended)
            print(f"  running: {running}; {waiting} waiting, {len(self.ended)} done", flush=True)

    def run(self) -> list[Part]:
        over = threading.Event()

        def tell() -> None:
            while not over.wait(PROGRESS):
                self.progress()

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        with ThreadPoolExecutor(self.jobs) as pool:
            parts = list(pool.map(self.run_one, self.targets))
        over.set()
        teller.join()
        return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", metavar="TARGET")
    parser.add_argument("--jobs", type=int, default=2, help="how many run in parallel (default: %(default)s)")
    arguments = parser.parse_args()
    LOGS.mkdir(exist_ok=True)
    start = time.monotonic()
    parts = Runner(arguments.targets, arguments.jobs).run()
    print()
    for part in parts:
        print(part.line())
    failed = [part for part in parts if part.status]
    for part in failed:
        for fault in FAULTS.findall(part.text())[:20]:
            print(f"  {part.target}: {fault[:300]}")
    print(f"{len(parts) - len(failed)} of {len(parts)} passed in {duration(time.monotonic() - start)}; logs: {LOGS.name}/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
