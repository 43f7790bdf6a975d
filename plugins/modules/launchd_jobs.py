#!/usr/bin/python
"""Make a list of launchd jobs so: property lists, orphans, and running with what the disk says."""

from __future__ import annotations

import glob
import os
import plistlib
import re
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: launchd_jobs
short_description: Makes a list of launchd jobs so, in one step
description:
  - Writes property lists, boots out and removes jobs of the same owner that are no longer listed, loads the rest and sees that
    they run.
  - Restarts a job whose process is older than a file of its C(restart_on). The comparison is made anew in each run, so a run
    that was killed between writing a file and restarting is repaired by the next one.
  - A job whose property list changes is booted out before the new one is written. So what launchd has loaded is always what the
    disk says, and a run that was killed in between leaves a job that is not loaded, which the next run sees.
  - A restart is a boot-out and a load, never C(kickstart -k), since what is documented of the latter is that it kills. The former
    grants the job its C(ExitTimeOut).
  - Waits until every job that it started stays up; otherwise fails with the end of the job's log.
options:
  owner:
    description: Who lists these jobs. Jobs with this owner that are not listed are booted out and removed.
    type: str
    required: true
  jobs:
    description: The jobs, in the order in which they are started. A job's label is the name of its file.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The label, such as C(mailroom-web).
        type: str
        required: true
      content:
        description: The property list, as XML.
        type: str
        required: true
      pid_file:
        description: Where the job's process writes its number when it starts; when it did is what the file's time says.
        type: path
      restart_on:
        description: Files and symbolic links whose change makes a restart due.
        type: list
        elements: path
        default: []
      settle:
        description: Seconds for which the job must stay up after a start.
        type: float
        default: 0
  directory:
    description: Where property lists are written.
    type: path
    required: true
  domain:
    description: >-
      The domain of the jobs, such as C(system). Empty for that of the user: C(gui/<uid>) where the user is logged in at the screen,
      otherwise C(user/<uid>).
    type: str
    default: ""
author: The maintainers of this bundle
"""

RETURN = r"""
started: {description: Jobs that were not loaded or not running., type: list, returned: always}
restarted: {description: Jobs that ran with older files., type: list, returned: always}
removed: {description: Jobs that were no longer listed., type: list, returned: always}
"""

# What launchctl exits with.
IN_PROGRESS = 36
GONE = (3, 113)
# A job that has just been booted out, or is still on its way, can't be loaded yet.
NOT_YET = (5, 37)

# Seconds for what launchd does by itself, beyond the time that a job has to stop.
PATIENCE = 20


class Failure(Exception):
    """A job can't be made so; carries the message for the person who runs the playbook."""


def marker(owner):
    """The comment in each property list that belongs to `owner`; XML has no two hyphens in comments."""
    return f"<!-- Managed by Ansible for {owner.replace('--', '- -')} -->\n"


def marked(content, owner):
    """A property list with its owner in it. XML wants its declaration first."""
    return content.replace("<plist", marker(owner) + "<plist", 1)


def read(path):
    """A file's text, or None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def parse(content, name):
    """The values of a property list, refused where launchd would refuse it."""
    try:
        values = plistlib.loads(content.encode())
    except Exception as error:
        raise Failure(f"The property list of {name} is none: {error}") from None
    if values.get("Label") != name:
        raise Failure(f"The property list of {name} has the label {values.get('Label')!r}.")
    return values


def orphans(directory, owner, wanted):
    """Paths of the property lists that carry the owner's marker and are not wanted any more."""
    found = glob.glob(os.path.join(glob.escape(directory), "*.plist"))
    return sorted(path for path in found if path not in wanted and marker(owner) in (read(path) or ""))


def newest(paths):
    """The latest modification time of the paths that exist, links not followed; 0.0 where none does."""
    times = [0.0]
    for path in paths:
        try:
            times.append(os.lstat(path).st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


def parse_print(text):
    """What `launchctl print` says of a job itself; what its endpoints and coalitions are is indented further."""
    values = {}
    for line in text.splitlines():
        match = re.match(r"\t(\w[\w ]*) = (.*)$", line)
        if match:
            values.setdefault(*match.groups())
    return values


def parse_disabled(text):
    """Labels that `launchctl print-disabled` calls disabled; older systems say true."""
    return re.findall(r'"([^"]+)" => (?:disabled|true)$', text, re.MULTILINE)


def process(state):
    """The number of a job's process, or None where it has none."""
    return int(state["pid"]) if state and "pid" in state else None


def runs(state):
    return int(state.get("runs", 0))


def is_stale(job, state):
    """Whether the job's process began before one of its files changed, or left no record of when it began."""
    pid = process(state)
    if pid is None or not job["restart_on"]:
        return False
    if (read(job["pid_file"]) or "").strip() != str(pid):
        return True
    return newest(job["restart_on"]) > os.stat(job["pid_file"]).st_mtime


class Jobs:
    """The jobs of one owner on this host."""

    def __init__(self, module):
        self.module = module
        self.check = module.check_mode
        self.owner = module.params["owner"]
        self.jobs = module.params["jobs"]
        self.directory = module.params["directory"]
        self.domain = module.params["domain"]
        self.result = {"changed": False, "started": [], "restarted": [], "removed": [], "diff": []}

    def launchctl(self, *arguments, allowed=()):
        """Run it; fail unless it exits with 0 or what is allowed. Without a limit of ours: a stop takes what the job is granted."""
        command = ["launchctl", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Failure("This host has no launchctl: its services can't be managed by launchd.") from None
        if done.returncode not in (0, *allowed):
            raise Failure(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def target(self, name):
        return f"{self.domain}/{name}"

    def path(self, name):
        return os.path.join(self.directory, f"{name}.plist")

    def own_domain(self):
        """An account that is not logged in at the screen, such as one reached by SSH alone, has no gui domain."""
        uid = os.geteuid()
        there = self.launchctl("print", f"gui/{uid}", allowed=range(256)).returncode == 0
        return f"gui/{uid}" if there else f"user/{uid}"

    def look(self, name):
        """What launchd says of a job, or None where it is not loaded."""
        done = self.launchctl("print", self.target(name), allowed=GONE)
        return None if done.returncode else parse_print(done.stdout)

    def changed(self, path, before, after):
        self.result["changed"] = True
        self.result["diff"].append({"before_header": path, "after_header": path, "before": before or "", "after": after or ""})

    def write(self, path, text):
        os.makedirs(self.directory, mode=0o755, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.directory, prefix=".ansible-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        self.module.atomic_move(name, path)
        # launchd refuses what others than its owner may write; what is moved gets the mode that the umask leaves it.
        os.chmod(path, 0o644)

    def lint(self, path, text):
        """Have Apple's own program look at a property list, where there is one, before anything is touched."""
        try:
            done = subprocess.run(["plutil", "-lint", "-s", "-"], input=text, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return
        if done.returncode:
            raise Failure(f"plutil refuses {path}: {done.stdout.strip() or done.stderr.strip()}")

    def run(self):
        self.domain = self.domain or self.own_domain()
        wanted = {self.path(job["name"]): marked(job["content"], self.owner) for job in self.jobs}
        plists = {job["name"]: parse(job["content"], job["name"]) for job in self.jobs}
        removed = {path: os.path.basename(path)[: -len(".plist")] for path in orphans(self.directory, self.owner, wanted)}
        states = {name: self.look(name) for name in [*removed.values(), *plists]}
        for path, text in wanted.items():
            if read(path) != text:
                self.lint(path, text)
        stop, load, kick = list(removed.values()), [], []
        for path in removed:
            self.changed(path, read(path), None)
        for job in self.jobs:
            name, path, state = job["name"], self.path(job["name"]), states[job["name"]]
            if read(path) != wanted[path]:
                self.changed(path, read(path), wanted[path])
            elif state is not None and not is_stale(job, state):
                if plists[name].get("KeepAlive") and process(state) is None:
                    kick.append(job)
                continue
            load.append(job)
            if state is not None:
                stop.append(name)
        self.result["removed"] = list(removed.values())
        self.result["restarted"] = [job["name"] for job in load if process(states[job["name"]]) is not None]
        self.result["started"] = [job["name"] for job in load + kick if job["name"] not in self.result["restarted"]]
        self.enable(plists)
        if not (stop or load or kick):
            return
        self.result["changed"] = True
        if self.check:
            return
        self.boot_out({name: states[name] for name in stop if states[name] is not None})
        for path in removed:
            os.unlink(path)
        for job in load:
            path = self.path(job["name"])
            if read(path) != wanted[path]:
                self.write(path, wanted[path])
        for job in load:
            self.bootstrap(job["name"])
        for job in kick:
            self.launchctl("kickstart", self.target(job["name"]))
        before = {job["name"]: runs(states[job["name"]]) for job in kick}
        self.settle({job["name"]: (job, plists[job["name"]], before.get(job["name"], 0)) for job in load + kick})

    def enable(self, plists):
        disabled = parse_disabled(self.launchctl("print-disabled", self.domain).stdout)
        for name in plists:
            if name in disabled:
                self.result["changed"] = True
                if not self.check:
                    self.launchctl("enable", self.target(name))

    def boot_out(self, states):
        """Stop jobs side by side; each has its own time to end."""
        begin = time.monotonic()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        asked = {name: subprocess.Popen(["launchctl", "bootout", self.target(name)], **pipes) for name in states}
        for name, asking in asked.items():
            _, error = asking.communicate()
            if asking.returncode not in (0, IN_PROGRESS, *GONE):
                raise Failure(f"`launchctl bootout {self.target(name)}` failed: {error.strip()}")
        # It may return before the process has ended.
        for name, state in states.items():
            until = begin + int(state.get("exit timeout", 0)) + PATIENCE
            while self.look(name) is not None:
                if time.monotonic() > until:
                    raise Failure(f"{name} was booted out and is still there after {until - begin:.0f} s.")
                time.sleep(0.2)

    def bootstrap(self, name):
        until = time.monotonic() + PATIENCE
        while True:
            done = self.launchctl("bootstrap", self.domain, self.path(name), allowed=range(256))
            if done.returncode == 0:
                return
            if done.returncode not in NOT_YET or time.monotonic() > until:
                raise Failure(f"`launchctl bootstrap {self.domain} {self.path(name)}` failed: {done.stderr.strip()}")
            time.sleep(1)

    def settle(self, started):
        """Watch the jobs just started: one that dies again within its settling time has not started."""
        begin = time.monotonic()
        watched = {name: entry for name, entry in started.items() if entry[1].get("KeepAlive")}
        until = begin + max([entry[0]["settle"] for entry in watched.values()] or [0])
        while watched:
            waiting = False
            for name, (_, plist, before) in watched.items():
                state = self.look(name) or {}
                pid, since = process(state), runs(state) - before
                if since > 1 or (since == 1 and pid is None) or (pid is None and time.monotonic() > until + PATIENCE):
                    raise Failure(
                        f"{name} was started and did not stay up: it is {state.get('state', 'not loaded')} "
                        f"(exit code {state.get('last exit code', 'unknown')}).\n{self.log(name, plist)}"
                    )
                waiting |= pid is None
            if not waiting and time.monotonic() >= until:
                return
            time.sleep(0.3)

    def log(self, name, plist):
        path = plist.get("StandardErrorPath", "")
        try:
            with open(path, "rb") as file:
                lines = file.read()[-20000:].decode(errors="replace").splitlines()[-40:]
        except OSError as error:
            return f"{name} has no log: {error}"
        return "\n".join([f"The end of the log of {name}, {path}:", *lines])


def main():
    module = AnsibleModule(
        argument_spec={
            "owner": {"type": "str", "required": True},
            "directory": {"type": "path", "required": True},
            "domain": {"type": "str", "default": ""},
            "jobs": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "content": {"type": "str", "required": True},
                    "pid_file": {"type": "path"},
                    "restart_on": {"type": "list", "elements": "path", "default": []},
                    "settle": {"type": "float", "default": 0},
                },
            },
        },
        supports_check_mode=True,
    )
    jobs = Jobs(module)
    try:
        jobs.run()
    except Failure as failure:
        module.fail_json(msg=str(failure), **jobs.result)
    module.exit_json(**jobs.result)


if __name__ == "__main__":
    main()
