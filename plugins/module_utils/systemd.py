"""Manages the systemd units of one owner: writes and enables them, and starts or restarts them together."""

from __future__ import annotations

import glob
import os
import re
import subprocess
import time
from collections.abc import Iterable
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.managed_files import (
    FirstLineMarker,
    ManagedFiles,
    newest,
    orphans,
)

# A unit in the module's option `units`, and the properties that `systemctl show` prints for a unit.
Unit = dict[str, Any]
Properties = dict[str, str]

PROPERTIES = (
    "Id,ActiveState,SubState,Result,LoadState,UnitFileState,NeedDaemonReload,NRestarts,"
    "ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic,StateChangeTimestampMonotonic,ReloadResult"
)
# Packages install files here.
PACKAGES = ("/usr/",)
# The error messages of Linux, Python and Erlang if another program already listens on an address.
TAKEN = re.compile("address (is )?already in use|eaddrinuse", re.IGNORECASE)
LISTENERS = ["ss", "--no-header", "--listening", "--tcp", "--numeric", "--processes"]
# The owner in the marker of a shared unit.
SEVERAL = "several owners"


def target_path(directory: str, unit: Unit) -> str:
    """Return the path of the unit file, or of the drop-in for a packaged unit."""
    if unit["packaged"]:
        return os.path.join(directory, unit["name"] + ".d", "50-ansible.conf")
    return os.path.join(directory, unit["name"])


def unit_files(directory: str) -> list[str]:
    """Return the paths in a directory that may be unit files or drop-ins."""
    return glob.glob(os.path.join(directory, "*")) + glob.glob(os.path.join(directory, "*.d", "*.conf"))


def time_of(properties: Properties, *names: str) -> Optional[float]:
    """Return the first of these times that is set, in seconds since the epoch according to the current clock, or None."""
    for name in names:
        stamp = properties.get(name) or "0"
        if stamp != "0":
            return time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - int(stamp) / 1e6)
    return None


def is_stale(properties: Properties, paths: Iterable[str]) -> bool:
    """Return whether the unit's process, or the unit, started before one of the files changed."""
    start = time_of(properties, "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    return start is not None and newest(paths, PACKAGES) > start


def needs_reload(properties: Properties, paths: Iterable[str]) -> bool:
    """Return whether the last start or reload was before one of the files changed, or the last reload failed.

    A reload changes the unit's state to `reloading` and back.
    """
    changed = time_of(properties, "StateChangeTimestampMonotonic")
    return changed is not None and (newest(paths, PACKAGES) > changed or properties.get("ReloadResult", "success") != "success")


def parse_show(text: str) -> dict[str, Properties]:
    """Return the properties that `systemctl show` printed, by the unit's name."""
    units = {}
    for block in text.strip().split("\n\n"):
        properties = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in properties:
            units[properties["Id"]] = properties
    return units


class Units:
    """The units of one owner on this host. `run` makes all changes. `result` is the module's result, also after a Failure."""

    def __init__(self, module: AnsibleModule) -> None:
        self.check = module.check_mode
        self.units: list[Unit] = module.params["units"]
        self.directory = module.params["directory"]
        self.marker = FirstLineMarker(module.params["owner"])
        self.files = ManagedFiles(module)
        self.started: list[str] = []
        self.restarted: list[str] = []
        self.reloaded: list[str] = []
        self.removed: list[str] = []
        self.result: dict[str, Any] = {
            "changed": False,
            "started": self.started,
            "restarted": self.restarted,
            "reloaded": self.reloaded,
            "removed": self.removed,
            "diff": self.files.diff,
        }

    def run(self) -> None:
        """Update the units to match the list, or in check mode report the changes. Raises Failure.

        A run that changes nothing calls systemctl once.
        """
        wanted = self.wanted_files()
        self.remove_orphans(wanted)
        self.write(wanted)
        if self.files.diff and not self.check:
            self.systemctl("daemon-reload")
        states = self.show()
        # An earlier run was killed after it wrote a file and before it reloaded systemd.
        if not self.check and not self.files.diff and any(state.get("NeedDaemonReload") == "yes" for state in states.values()):
            self.systemctl("daemon-reload")
            states = self.show()
        if self.check and any(state.get("LoadState") == "not-found" for state in states.values()):
            # The unit's file or package is not installed yet.
            self.result["changed"] = True
        self.enable(states)
        self.start(states)
        self.reload(states)

    def systemctl(self, *arguments: str, fail: bool = True) -> str:
        """Return the output of systemctl.

        The call has no time limit, since units have their own limits and workers may take a long time to stop.
        """
        command = ["systemctl", "--no-ask-password", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Failure("This host has no systemctl, so systemd can't manage its services.") from None
        if fail and done.returncode:
            raise Failure(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def show(self) -> dict[str, Properties]:
        names = [unit["name"] for unit in self.units]
        return parse_show(self.systemctl("show", "--property", PROPERTIES, "--", *names)) if names else {}

    def wanted_files(self) -> dict[str, str]:
        """Return the texts of the units' files, by path."""
        shared = FirstLineMarker(SEVERAL)
        return {
            target_path(self.directory, unit): (shared if unit["shared"] else self.marker).put(unit["content"])
            for unit in self.units
            if unit["content"] is not None
        }

    def remove_orphans(self, wanted: dict[str, str]) -> None:
        for path in orphans(unit_files(self.directory), self.marker, wanted):
            name = os.path.basename(path)
            self.files.note(path, None)
            self.removed.append(name)
            self.result["changed"] = True
            if self.check:
                continue
            # The unit of a drop-in belongs to a package.
            if not path.endswith(".conf"):
                self.systemctl("disable", "--now", "--", name)
            os.unlink(path)

    def write(self, wanted: dict[str, str]) -> None:
        for path, text in wanted.items():
            if self.files.note(path, text):
                self.result["changed"] = True
                if not self.check:
                    self.files.write(path, text)

    def enable(self, states: dict[str, Properties]) -> None:
        disabled = [unit["name"] for unit in self.units if states.get(unit["name"], {}).get("UnitFileState") == "disabled"]
        if disabled:
            self.result["changed"] = True
            if not self.check:
                self.systemctl("enable", "--", *disabled)

    def start(self, states: dict[str, Properties]) -> None:
        """Start units that are down, restart units that are stale, and wait for all these units together."""
        acted = []
        # The services of restarted sockets. They are stopped first, since systemd refuses to restart a socket while its service
        # runs.
        of_sockets: list[str] = []
        for unit in self.units:
            name = unit["name"]
            if unit["standby_of"] or unit["on_demand"]:
                continue
            state = states.get(name, {})
            if state.get("ActiveState") not in ("active", "reloading"):
                self.started.append(name)
            # The restart of a target would restart all its units.
            elif not name.endswith(".target") and (name in of_sockets or is_stale(state, self.files_of(unit))):
                self.restarted.append(name)
            else:
                continue
            acted.append(unit)
            if name.endswith(".socket"):
                of_sockets.append(name[: -len("socket")] + "service")
        standbys = [
            unit["name"] for unit in self.units if unit["standby_of"] in self.restarted and unit["standby_of"] not in of_sockets
        ]
        # A killed run can have left these units running.
        all_standbys = [unit["name"] for unit in self.units if unit["standby_of"]]
        left = [name for name in all_standbys if states.get(name, {}).get("ActiveState") == "active"]
        if not acted and not left:
            return
        self.result["changed"] = True
        if self.check:
            return
        try:
            if standbys:
                self.act([("restart", standbys)], standbys)
            if acted:
                self.start_together(acted, states, of_sockets)
        finally:
            if standbys or left:
                self.systemctl("stop", "--", *dict.fromkeys(standbys + left))
                # A standby that did not start must not stay in the list of failed units.
                self.systemctl("reset-failed", "--", *standbys, fail=False)

    def start_together(self, acted: list[Unit], states: dict[str, Properties], of_sockets: list[str]) -> None:
        names = [unit["name"] for unit in acted]
        if of_sockets:
            self.systemctl("stop", "--", *of_sockets, fail=False)
        # `reset-failed` resets the start limit and the count of restarts. `settle` uses this count to detect that a unit died.
        self.systemctl("reset-failed", "--", *names, fail=False)
        # For a unit that systemd is already restarting, systemd would count a start as another automatic restart.
        activating = [name for name in self.started if states.get(name, {}).get("ActiveState") == "activating"]
        restart = self.restarted + activating
        # With one call per verb, systemd stops and starts the units in parallel, in the order that the units require.
        self.act([("restart", restart), ("start", [name for name in names if name not in restart])], names)
        self.settle(acted)

    def act(self, calls: Iterable[tuple[str, list[str]]], names: list[str]) -> None:
        """Call systemctl for each verb and its units. Raises Failure with the journals of the units that are not active then."""
        try:
            for verb, chosen in calls:
                if chosen:
                    self.systemctl(verb, "--", *chosen)
        except Failure as failure:
            states = self.show()
            down = [name for name in names if states.get(name, {}).get("ActiveState") != "active"]
            raise Failure("\n".join([str(failure), *map(self.journal, down)])) from None

    def reload(self, states: dict[str, Properties]) -> None:
        """Reload units that are stale and were not started."""
        for unit in self.units:
            name = unit["name"]
            # A unit without reload_on may not support a reload.
            if not unit["reload_on"] or name in (*self.started, *self.restarted):
                continue
            if needs_reload(states.get(name, {}), unit["reload_on"]):
                self.reloaded.append(name)
        if self.reloaded:
            self.result["changed"] = True
        for name in [] if self.check else self.reloaded:
            try:
                self.systemctl("reload", "--", name)
            except Failure as failure:
                raise Failure(f"{failure}\n{self.journal(name)}") from None

    def files_of(self, unit: Unit) -> list[str]:
        return [target_path(self.directory, unit), *unit["restart_on"]]

    def settle(self, units: list[Unit]) -> None:
        """Watch the started units until the longest settling time is over. Raises Failure if a unit dies."""
        until = time.monotonic() + max(unit["settle"] for unit in units)
        while True:
            states = self.show()
            for name in [unit["name"] for unit in units]:
                state = states.get(name, {})
                if state.get("ActiveState") != "active" or state.get("NRestarts", "0") not in ("0", ""):
                    raise Failure(
                        f"{name} was started but did not keep running: it is {state.get('ActiveState')} "
                        f"({state.get('SubState')}, {state.get('Result')}).\n{self.journal(name)}"
                    )
            if time.monotonic() >= until:
                return
            time.sleep(0.3)

    def journal(self, name: str) -> str:
        """Return the last lines of a unit's journal. If another program uses an address of the unit, name that program first."""
        command = ["journalctl", "--no-pager", "--lines=40", "--output=cat", "--unit", name]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
        cause = ""
        if TAKEN.search(text):
            listeners = subprocess.run(LISTENERS, capture_output=True, text=True, check=False).stdout.strip()
            cause = f"An address that {name} listens on is in use by another program. The listeners of this host:\n{listeners}\n"
        return f"{cause}The end of the journal of {name}:\n{text}"
