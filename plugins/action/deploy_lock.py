"""Holds a lock on a host until the run of Ansible ends, even if the run fails or is killed.

Ansible runs no task after a failed or killed run, so no task could release the lock. Instead, a process on the host holds the lock,
and a process on the controller keeps the connection to it until the run ends. When the process on the host ends, the kernel
releases the lock.
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
import signal
import socket
import threading
import time
import uuid
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# Exit code of the program on the host if another run has the lock.
REFUSED = 75
# Runs on the host. After a run has ended, its program keeps the lock until its next write fails, for at most two seconds.
PROGRAM = f"""
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
until = time.monotonic() + 4
while True:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except OSError:
        if time.monotonic() > until:
            sys.exit({REFUSED})
        time.sleep(0.2)
os.ftruncate(file, 0)
os.write(file, sys.argv[2].encode())
while True:
    print(flush=True)
    time.sleep(1)
"""


class ActionModule(ActionBase):
    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, options = self.validate_argument_spec({"path": {"type": "path", "required": True}})
        if self._task.check_mode:
            return {**result, "skipped": True}
        record = {
            "user": os.environ.get("SUDO_USER") or getpass.getuser(),
            "controller": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "run": uuid.uuid4().hex,
        }
        run = os.getppid()
        errors, report = os.pipe()
        holder = os.fork()
        if holder == 0:
            self.hold(run, report, options["path"], json.dumps(record))
        os.close(report)
        while True:
            # Check the process before reading the record, since a process that has ended can't take the lock later.
            ended, status = os.waitpid(holder, os.WNOHANG)
            found = self.read(options["path"])
            if ended:
                return self.refused(os.waitstatus_to_exitcode(status), found, os.fdopen(errors).read())
            if found.get("run") == record["run"]:
                os.close(errors)
                # The task does not report a change, since the lock is released when the run ends.
                return {**result, "changed": False, "holder": record}
            time.sleep(0.3)

    def hold(self, run: int, report: int, path: str, record: str) -> None:
        """Hold the lock until the process `run` ends. This method runs in a separate process and never returns."""
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            threading.Thread(target=self.end_with, args=(run,), daemon=True).start()
            done = self._low_level_execute_command(shlex.join(["python3", "-c", PROGRAM, path, record]))
            code = done["rc"]
            os.write(report, done["stderr"].encode())
        except Exception as error:
            os.write(report, str(error).encode())
        finally:
            os._exit(code if code in (0, REFUSED) else 1)

    @staticmethod
    def end_with(run: int) -> None:
        """End this process and its connection when the run has ended."""
        while True:
            try:
                os.kill(run, 0)
            except OSError:
                os.killpg(0, signal.SIGKILL)
            time.sleep(0.5)

    def read(self, path: str) -> dict[str, str]:
        """Return the record of the run that has the lock, or that had it last."""
        try:
            return json.loads(self._low_level_execute_command(shlex.join(["cat", path]))["stdout"])
        except ValueError:
            return {}

    def refused(self, code: int, found: dict[str, str], error: str) -> dict[str, Any]:
        if code != REFUSED:
            raise AnsibleActionFail(f"Can't take the lock: {error.strip()}")
        who = f"{found.get('user')}@{found.get('controller')} since {found.get('since')}"
        raise AnsibleActionFail(
            f"Another run is deploying this environment: {who}. Its lock is released when that run ends, even if it is killed."
        )
