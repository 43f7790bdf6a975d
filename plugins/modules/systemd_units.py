#!/usr/bin/python
"""Make a list of systemd units so: files, orphans, enablement, and running with what the disk says."""

from __future__ import annotations

import glob
import os
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: systemd_units
short_description: Makes a list of systemd units so, in one step
description:
  - Writes unit files and drop-ins, removes units of the same owner that are no longer listed, enables and starts the rest.
  - Restarts a unit whose process is older than its unit file or than a file of its C(restart_on). The comparison is made
    anew in each run, so a run that was killed between writing a file and restarting is repaired by the next one. A handler
    would be forgotten.
  - Waits until every unit that it started is active and stays so; otherwise fails with the end of the unit's journal.
options:
  owner:
    description: Who lists these units. Units with this owner that are not listed are stopped and removed.
    type: str
    required: true
  units:
    description: The units, in the order in which they are started.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The unit's full name, such as C(mailroom-web.service).
        type: str
        required: true
      content:
        description: The unit file's text, or the drop-in's.
        type: str
      packaged:
        description: The unit comes from a package; C(content) is a drop-in for it.
        type: bool
        default: false
      shared:
        description: The unit has several owners and is never removed as an orphan.
        type: bool
        default: false
      restart_on:
        description: Files and symbolic links whose change makes a restart due.
        type: list
        elements: path
        default: []
      settle:
        description: Seconds for which the unit must stay active after a start.
        type: float
        default: 0
  directory:
    description: Where unit files are written.
    type: path
    default: /etc/systemd/system
author: The maintainers of this bundle
"""

RETURN = r"""
started: {description: Units that were not running., type: list, returned: always}
restarted: {description: Units that ran with older files., type: list, returned: always}
removed: {description: Units that were no longer listed., type: list, returned: always}
"""

PROPERTIES = (
    "Id,ActiveState,SubState,Result,LoadState,UnitFileState,NeedDaemonReload,NRestarts,"
    "ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic"
)


class Failure(Exception):
    """A unit can't be made so; carries the message for the person who runs the playbook."""


def marker(owner):
    """First line of each file that belongs to `owner`."""
    return f"# Managed by Ansible for {owner}\n"


def target_path(directory, unit):
    """The file that carries a unit's text: the unit file, or a drop-in for a packaged unit."""
    if unit["packaged"]:
        return os.path.join(directory, unit["name"] + ".d", "50-ansible.conf")
    return os.path.join(directory, unit["name"])


def read(path):
    """A file's text, or None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def orphans(directory, owner, wanted):
    """Paths of the files that carry the owner's marker and are not wanted any more."""
    found = glob.glob(os.path.join(directory, "*")) + glob.glob(os.path.join(directory, "*.d", "*.conf"))
    first_line = marker(owner)
    return sorted(
        path for path in found if os.path.isfile(path) and path not in wanted and (read(path) or "").startswith(first_line)
    )


def started_at(properties):
    """Seconds since the epoch, by the present clock, at which the unit's process or the unit itself started; None if it did not."""
    stamp = properties.get("ExecMainStartTimestampMonotonic") or "0"
    if stamp == "0":
        stamp = properties.get("ActiveEnterTimestampMonotonic") or "0"
    if stamp == "0":
        return None
    return time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - int(stamp) / 1e6)


def newest(paths):
    """The latest modification time of the paths that exist, links not followed; 0.0 where none does.

    What lies under /usr comes from packages, and rpm gives a file the time at which it was built: there the time counts at
    which it was put in its place.
    """
    times = [0.0]
    for path in paths:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            continue
        times.append(found.st_ctime if path.startswith("/usr/") else found.st_mtime)
    return max(times)


def is_stale(properties, paths):
    """Whether the unit runs with files that are older than those on the disk."""
    start = started_at(properties)
    return start is not None and newest(paths) > start


def parse_show(text):
    """`systemctl show` of several units, as a mapping of name to properties."""
    units = {}
    for block in text.strip().split("\n\n"):
        properties = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in properties:
            units[properties["Id"]] = properties
    return units


class Units:
    """The units of one owner on this host."""

    def __init__(self, module):
        self.module = module
        self.check = module.check_mode
        self.owner = module.params["owner"]
        self.units = module.params["units"]
        self.directory = module.params["directory"]
        self.result = {"changed": False, "started": [], "restarted": [], "removed": [], "diff": []}

    def systemctl(self, *arguments, fail=True):
        command = ["systemctl", "--no-ask-password", *arguments]
        try:
            # Without a limit of ours: how long a start and a stop may take is for the unit to say, and a worker's stop takes long.
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Failure("This host has no systemctl: its services can't be managed by systemd.") from None
        if fail and done.returncode:
            raise Failure(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def show(self):
        return parse_show(self.systemctl("show", "--property", PROPERTIES, "--", *[u["name"] for u in self.units]))

    def changed(self, path, before, after):
        self.result["changed"] = True
        self.result["diff"].append({"before_header": path, "after_header": path, "before": before or "", "after": after or ""})

    def write(self, path, text):
        directory = os.path.dirname(path)
        os.makedirs(directory, mode=0o755, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, prefix=".ansible-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        self.module.atomic_move(name, path)

    def remove_orphans(self, wanted):
        for path in orphans(self.directory, self.owner, wanted):
            name = os.path.basename(path)
            self.changed(path, read(path), None)
            self.result["removed"].append(name)
            if not self.check:
                if not path.endswith(".conf"):
                    # A stop takes as long as the unit's own stop timeout grants: a worker finishes its task.
                    self.systemctl("disable", "--now", "--", name)
                os.unlink(path)

    def write_files(self):
        wanted = {}
        for unit in self.units:
            if unit["content"] is not None:
                owner = "several owners" if unit["shared"] else self.owner
                wanted[target_path(self.directory, unit)] = marker(owner) + unit["content"]
        self.remove_orphans(wanted)
        for path, text in wanted.items():
            before = read(path)
            if before != text:
                self.changed(path, before, text)
                if not self.check:
                    self.write(path, text)

    def run(self):
        self.write_files()
        if not self.check and (self.result["changed"] or any(p.get("NeedDaemonReload") == "yes" for p in self.show().values())):
            self.systemctl("daemon-reload")
        states = self.show()
        if self.check and any(p.get("LoadState") == "not-found" for p in states.values()):
            # The unit's package or file is not there yet: what would be started is what is listed.
            self.result["changed"] = True
        self.enable(states)
        self.start(states)

    def enable(self, states):
        disabled = [unit["name"] for unit in self.units if states.get(unit["name"], {}).get("UnitFileState") == "disabled"]
        if disabled:
            self.result["changed"] = True
            if not self.check:
                self.systemctl("enable", "--", *disabled)

    def start(self, states):
        acted = []
        # Services of the sockets that are restarted: systemd refuses to restart a socket while its service runs.
        fed = []
        for unit in self.units:
            name = unit["name"]
            properties = states.get(name, {})
            files = [target_path(self.directory, unit), *unit["restart_on"]]
            if properties.get("ActiveState") not in ("active", "reloading"):
                self.result["started"].append(name)
            elif not name.endswith(".target") and (is_stale(properties, files) or name in fed):
                self.result["restarted"].append(name)
            else:
                continue
            acted.append(unit)
            if name.endswith(".socket"):
                fed.append(name[: -len("socket")] + "service")
        if not acted:
            return
        self.result["changed"] = True
        if self.check:
            return
        names = [unit["name"] for unit in acted]
        if fed:
            self.systemctl("stop", "--", *fed, fail=False)
        self.systemctl("reset-failed", "--", *names, fail=False)
        # A unit that systemd is about to bring back is restarted: a start would count as one restart more.
        dying = [name for name in self.result["started"] if states.get(name, {}).get("ActiveState") == "activating"]
        restart = self.result["restarted"] + dying
        try:
            # One call each: systemd stops and starts them side by side, in the order that the units ask for.
            for verb, listed in (("restart", restart), ("start", [name for name in names if name not in restart])):
                if listed:
                    self.systemctl(verb, "--", *listed)
        except Failure as failure:
            states = self.show()
            down = [name for name in names if states.get(name, {}).get("ActiveState") != "active"]
            raise Failure("\n".join([str(failure), *map(self.journal, down)])) from None
        self.settle(acted)

    def settle(self, acted):
        """Watch the units just started: one that dies again within its settling time has not started."""
        begin = time.monotonic()
        until = {unit["name"]: begin + unit["settle"] for unit in acted}
        while True:
            states = self.show()
            for name in until:
                properties = states.get(name, {})
                if properties.get("ActiveState") != "active" or properties.get("NRestarts", "0") not in ("0", ""):
                    raise Failure(
                        f"{name} was started and did not stay up: it is {properties.get('ActiveState')} "
                        f"({properties.get('SubState')}, {properties.get('Result')}).\n{self.journal(name)}"
                    )
            if time.monotonic() >= max(until.values()):
                return
            time.sleep(0.3)

    def journal(self, name):
        done = subprocess.run(
            ["journalctl", "--no-pager", "--lines=40", "--output=cat", "--unit", name],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return f"The end of the journal of {name}:\n{done.stdout.strip()}"


def main():
    module = AnsibleModule(
        argument_spec={
            "owner": {"type": "str", "required": True},
            "directory": {"type": "path", "default": "/etc/systemd/system"},
            "units": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "content": {"type": "str"},
                    "packaged": {"type": "bool", "default": False},
                    "shared": {"type": "bool", "default": False},
                    "restart_on": {"type": "list", "elements": "path", "default": []},
                    "settle": {"type": "float", "default": 0},
                },
            },
        },
        supports_check_mode=True,
    )
    units = Units(module)
    try:
        units.run()
    except Failure as failure:
        module.fail_json(msg=str(failure), **units.result)
    module.exit_json(**units.result)


if __name__ == "__main__":
    main()
