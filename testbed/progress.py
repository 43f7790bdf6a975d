"""Progress lines with the seconds since the start."""

from __future__ import annotations

import collections
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from testbed.machine import TestbedError

_start = time.monotonic()

SILENCE = 5  # seconds between two lines of a running step


def say(who: str, what: str) -> None:
    """Print one line about `who`."""
    # The line is written with one call, because threads for several hosts print at the same time.
    sys.stdout.write(f"[{time.monotonic() - _start:6.1f} s] {who}: {what}\n")
    sys.stdout.flush()


def run_long(who: str, what: str, command: Sequence[str], directory: Path | None = None) -> None:
    """Run a slow `command` and print its latest output every SILENCE seconds.

    Raise TestbedError with the end of its output when it fails.
    """
    say(who, what)
    began = time.monotonic()
    lines: collections.deque[str] = collections.deque(maxlen=20)
    with subprocess.Popen(
        command,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory,
    ) as process:
        output = process.stdout or ()
        reader = threading.Thread(target=lambda: lines.extend(line.rstrip() for line in output if line.strip()))
        reader.start()
        while process.poll() is None:
            reader.join(timeout=SILENCE)
            if reader.is_alive():
                elapsed = time.monotonic() - began
                say(who, f"{what} ({elapsed:.0f} s): {lines[-1][:70] if lines else '…'}")
            else:
                process.wait()
        reader.join()
    if process.returncode:
        raise TestbedError(f"{who}: {what}: failed\n  " + "\n  ".join(lines))
