"""Manages the launchd jobs of one owner: writes, loads, starts and restarts them."""

from __future__ import annotations

import glob
import os
import plistlib
import re
import subprocess
import time
from collections.abc import Collection
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.managed_files import (
    ManagedFiles,
    PropertyListMarker,
    newest,
    orphans,
    read,
)

# A job in the module's option `jobs`, its property list, and its state from `launchctl print`, or None if it is not loaded.
Job = dict[str, Any]
PropertyList = dict[str, Any]
State = Optional[dict[str, str]]

# Exit codes of launchctl: the job is still stopping, or it is not loaded.
IN_PROGRESS = 36
GONE = (3, 113)
# Exit codes of launchctl if a job can't be loaded yet, because it was just booted out or is still stopping.
NOT_YET = (5, 37)
ANY = range(256)

# Seconds that launchd has in addition to the job's stop timeout.
PATIENCE = 20


def parse(content: str, name: str) -> PropertyList:
    """Return the values of a job's property list. Raises Failure if launchd would refuse it."""
    try:
        values: PropertyList = plistlib.loads(content.encode())
    except Exception as error:
        raise Failure(f"The content of {name} is not a property list: {error}") from None
    if values.get("Label") != name:
        raise Failure(f"The property list of {name} has the label {values.get('Label')!r}.")
    return values


def parse_print(text: str) -> dict[str, str]:
    """Return the values that `launchctl print` shows for a job. Skip more deeply indented values, which belong to its endpoints."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"\t(\w[\w ]*) = (.*)$", line)
        if match:
            values.setdefault(match[1], match[2])
    return values


def parse_disabled(text: str) -> list[str]:
    """Return the labels that `launchctl print-disabled` shows as disabled. Older systems show them as true."""
    return re.findall(r'"([^"]+)" => (?:disabled|true)$', text, re.MULTILINE)


def process(state: State) -> Optional[int]:
    """Return the process ID of a job, or None if it has no process."""
    return int(state["pid"]) if state and "pid" in state else None


def runs(state: State) -> int:
    """Return how many times launchd has started a job since it was loaded."""
    return int((state or {}).get("runs", 0))


def is_stale(job: Job, state: State) -> bool:
    """Return whether one of the job's files is newer than the job's process. A process without a recorded start counts as stale."""
    pid = process(state)
    if pid is None or not job["restart_on"]:
        return False
    if (read(job["pid_file"]) or "").strip() != str(pid):
        return True
    return newest(job["restart_on"]) > os.stat(job["pid_file"]).st_mtime


def log_end(name: str, plist: PropertyList) -> str:
    """Return the end of a job's log for an error message."""
    path = plist.get("StandardErrorPath", "")
    try:
        with open(path, "rb") as file:
            lines = file.read()[-20000:].decode(errors="replace").splitlines()[-40:]
    except OSError as error:
        return f"{name} has no log: {error}"
    return "\n".join([f"The end of the log of {name}, {path}:", *lines])


class Jobs:
    """The jobs of one owner on this host. `run` makes all changes. `result` is the module's result, also after a Failure."""

    def __init__(self, module: AnsibleModule) -> None:
        self.check = module.check_mode
        self.jobs: list[Job] = module.params["jobs"]
        self.directory = module.params["directory"]
        self.domain = module.params["domain"]
        self.marker = PropertyListMarker(module.params["owner"])
        self.files = ManagedFiles(module)
        self.result: dict[str, Any] = {
            "changed": False,
            "started": [],
            "restarted": [],
            "removed": [],
            "diff": self.files.diff,
        }

    def launchctl(self, *arguments: str, allowed: Collection[int] = ()) -> subprocess.CompletedProcess[str]:
        """Run launchctl. Raises Failure unless it exits with 0 or an allowed code.

        There is no time limit, since each job has its own stop timeout.
        """
        command = ["launchctl", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Failure("This host has no launchctl, so launchd can't manage its services.") from None
        if done.returncode not in (0, *allowed):
            raise Failure(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def target(self, name: str) -> str:
        return f"{self.domain}/{name}"

    def path(self, name: str) -> str:
        return os.path.join(self.directory, f"{name}.plist")

    def own_domain(self) -> str:
        """Return the user's launchd domain. A user without a graphical login, such as over SSH, has no gui domain."""
        uid = os.geteuid()
        logged_in = self.launchctl("print", f"gui/{uid}", allowed=ANY).returncode == 0
        return f"gui/{uid}" if logged_in else f"user/{uid}"

    def state(self, name: str) -> State:
        done = self.launchctl("print", self.target(name), allowed=GONE)
        return None if done.returncode else parse_print(done.stdout)

    def lint(self, path: str, text: str) -> None:
        """Check a property list with Apple's plutil, if it is installed. Raises Failure."""
        try:
            done = subprocess.run(["plutil", "-lint", "-s", "-"], input=text, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return
        if done.returncode:
            raise Failure(f"plutil rejects {path}: {done.stdout.strip() or done.stderr.strip()}")

    def run(self) -> None:
        """Update the jobs to match the list, or in check mode report the changes. Raises Failure."""
        self.domain = self.domain or self.own_domain()
        plists = {job["name"]: parse(job["content"], job["name"]) for job in self.jobs}
        wanted = {self.path(job["name"]): self.marker.put(job["content"]) for job in self.jobs}
        paths = glob.glob(os.path.join(glob.escape(self.directory), "*.plist"))
        removed = {path: os.path.basename(path)[: -len(".plist")] for path in orphans(paths, self.marker, wanted)}
        states = {name: self.state(name) for name in [*removed.values(), *plists]}
        changed = {path: text for path, text in wanted.items() if read(path) != text}
        for path, text in changed.items():
            self.lint(path, text)
        for path in removed:
            self.files.note(path, None)
        for path, text in changed.items():
            self.files.note(path, text)
        stop, load, kick = list(removed.values()), [], []
        for job in self.jobs:
            name, state = job["name"], states[job["name"]]
            if self.path(name) in changed or state is None or is_stale(job, state):
                load.append(job)
                if state is not None:
                    stop.append(name)
            elif plists[name].get("KeepAlive") and process(state) is None:
                kick.append(job)
        restarted = [job["name"] for job in load if process(states[job["name"]]) is not None]
        self.result["removed"] = list(removed.values())
        self.result["restarted"] = restarted
        self.result["started"] = [job["name"] for job in load + kick if job["name"] not in restarted]
        self.enable(plists)
        if not (stop or load or kick):
            return
        self.result["changed"] = True
        if self.check:
            return
        self.boot_out({name: states[name] for name in stop if states[name] is not None})
        for path in removed:
            os.unlink(path)
        for path, text in changed.items():
            self.files.write(path, text)
        for job in load:
            self.bootstrap(job["name"])
        for job in kick:
            self.launchctl("kickstart", self.target(job["name"]))
        before = {job["name"]: runs(states[job["name"]]) for job in kick}
        self.settle(load + kick, plists, before)

    def enable(self, names: Collection[str]) -> None:
        disabled = parse_disabled(self.launchctl("print-disabled", self.domain).stdout)
        for name in names:
            if name in disabled:
                self.result["changed"] = True
                if not self.check:
                    self.launchctl("enable", self.target(name))

    def boot_out(self, states: dict[str, State]) -> None:
        """Stop jobs in parallel. Each job has its own stop timeout. Raises Failure."""
        begin = time.monotonic()
        calls = {
            name: subprocess.Popen(
                ["launchctl", "bootout", self.target(name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for name in states
        }
        for name, call in calls.items():
            _, error = call.communicate()
            if call.returncode not in (0, IN_PROGRESS, *GONE):
                raise Failure(f"`launchctl bootout {self.target(name)}` failed: {error.strip()}")
        # launchctl may exit before the process does.
        for name, state in states.items():
            until = begin + int((state or {}).get("exit timeout", 0)) + PATIENCE
            while self.state(name) is not None:
                if time.monotonic() > until:
                    raise Failure(f"{name} was booted out and is still loaded after {until - begin:.0f} s.")
                time.sleep(0.2)

    def bootstrap(self, name: str) -> None:
        """Load a job. Retry while launchd has not removed the previous one. Raises Failure."""
        until = time.monotonic() + PATIENCE
        while True:
            done = self.launchctl("bootstrap", self.domain, self.path(name), allowed=ANY)
            if done.returncode == 0:
                return
            if done.returncode not in NOT_YET or time.monotonic() > until:
                raise Failure(f"`launchctl bootstrap {self.domain} {self.path(name)}` failed: {done.stderr.strip()}")
            time.sleep(1)

    def settle(self, jobs: list[Job], plists: dict[str, PropertyList], before: dict[str, int]) -> None:
        """Watch the started jobs until the longest settling time is over. Raises Failure if a job dies.

        `before` contains the number of runs of each loaded job before this start.
        """
        watched = [job for job in jobs if plists[job["name"]].get("KeepAlive")]
        until = time.monotonic() + max([job["settle"] for job in watched], default=0)
        while watched:
            waiting = False
            for name in [job["name"] for job in watched]:
                state = self.state(name) or {}
                pid, since = process(state), runs(state) - before.get(name, 0)
                if since > 1 or (since == 1 and pid is None) or (pid is None and time.monotonic() > until + PATIENCE):
                    raise Failure(
                        f"{name} was started but did not keep running: it is {state.get('state', 'not loaded')} "
                        f"(exit code {state.get('last exit code', 'unknown')}).\n{log_end(name, plists[name])}"
                    )
                waiting |= pid is None
            if not waiting and time.monotonic() >= until:
                return
            time.sleep(0.3)
