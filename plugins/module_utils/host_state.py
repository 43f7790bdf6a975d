"""Compares users, directories and files on a host with a role's lists, and changes those that differ."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import re
import struct
import subprocess
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.managed_files import read, replace_file

# The suffix of a staged file until a role renames the file.
STAGED_SUFFIX = ".new"

NO_LOGIN = "/usr/sbin/nologin"
DPKG_QUERY = ["dpkg-query", "--show", "--showformat=${Package}\t${db:Status-Status}\t${Version}\n"]
RPM_QUERY = ["rpm", "--query", "--queryformat=%{NAME}\tinstalled\t%{VERSION}\n"]
DPKG_LOCK = "/var/lib/dpkg/lock-frontend"
DEBIAN = "/etc/debian_version"

# An entry of one of the module's lists.
Entry = dict[str, Any]


def run_command(*command: str) -> str:
    """Return the output of a command. Raises Failure with the command's error output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def installed_versions(names: list[str]) -> dict[str, str]:
    """Return the versions of the given packages that are installed, in the format of dpkg or rpm."""
    if not names:
        return {}
    query = DPKG_QUERY if os.path.exists(DEBIAN) else RPM_QUERY
    # If a package is not installed, dpkg-query and rpm return an error, but print the other packages.
    text = subprocess.run([*query, *names], capture_output=True, text=True, check=False).stdout
    rows = [line.split("\t") for line in text.splitlines()]
    return {row[0]: row[2] for row in rows if len(row) == 3 and row[1] == "installed"}


def lock_holder(path: str) -> str:
    """Return the program that holds an fcntl lock on a file, with its process ID.

    Return an empty string if no program holds one.
    """
    # The fields of struct flock on Linux: type, base of the offset, offset, length, process ID.
    layout = "hhqqi4x"
    asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with open(path, "rb") as file:
            kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except FileNotFoundError:
        return ""
    if kind == fcntl.F_UNLCK:
        return ""
    return f"{(read(f'/proc/{pid}/comm') or 'a program').strip()} (process {pid})"


def user_id(name: str) -> Optional[int]:
    """Return the UID of a user from its name or UID. Return None if the user does not exist."""
    try:
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group_id(name: str) -> Optional[int]:
    """Return the GID of a group from its name or GID. Return None if the group does not exist."""
    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        return None


class HostState:
    """Updates a host to the users, directories and files that a role lists, and reports packages.

    Call `run`, then read `result`, which is also valid after a Failure.
    """

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.check: bool = module.check_mode
        self.diff: list[dict[str, Any]] = []
        self.staged: list[str] = []
        self.result: dict[str, Any] = {"changed": False, "diff": self.diff, "staged": self.staged}

    def run(self) -> None:
        """Update the host to match the lists, or in check mode report the changes. Raises Failure."""
        wanted = self.module.params
        versions = installed_versions(list(wanted["packages"]))
        self.result["packages"] = versions
        self.result["packages_missing"] = [
            name for name, pattern in wanted["packages"].items() if name not in versions or not re.match(pattern, versions[name])
        ]
        if self.result["packages_missing"] and not self.check:
            self.warn_about_lock()
        paths = {path: os.path.exists(path) for path in [*wanted["look_at"], *wanted["requires"]]}
        self.result["exists"] = paths
        self.result["links"] = {path: os.readlink(path) for path in paths if os.path.islink(path)}
        self.result["applied"] = all(paths[path] for path in wanted["requires"])
        if not self.result["applied"]:
            return
        for user in wanted["users"]:
            self.user(user["name"], user["home"], user["group"])
        for directory in wanted["directories"]:
            self.directory(directory)
        for file in wanted["files"]:
            self.file(file)

    def warn_about_lock(self) -> None:
        """Warn if another program holds the lock of dpkg: the role's next task waits for it without output."""
        holder = lock_holder(DPKG_LOCK)
        if holder:
            self.module.warn(
                f"{holder} holds the lock of dpkg on {os.uname().nodename}. The installation waits for it, at most "
                "host_package_lock_timeout seconds."
            )

    def changes(self, path: str, before: object, after: object) -> None:
        """Add a diff entry. Ansible prints values other than strings as JSON."""
        self.result["changed"] = True
        self.diff.append({"before_header": path, "after_header": path, "before": before, "after": after})

    def user(self, name: str, home: str, group: Optional[str]) -> None:
        """Create or correct a system user that can't log in, without its home directory.

        Without `group`, a new user gets a group of the same name. An existing user keeps its group.
        """
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            command = ["useradd", "--system", "--no-create-home", "--home-dir", home, "--shell", NO_LOGIN]
            if group is not None or group_id(name) is not None:
                command += ["--gid", group or name]
            before = {}
        else:
            before = {"home": found.pw_dir, "shell": found.pw_shell}
            command = ["usermod", "--home", home, "--shell", NO_LOGIN]
        after = {"home": home, "shell": NO_LOGIN}
        if before == after:
            return
        self.changes(f"user {name}", before, after)
        if not self.check:
            run_command(*command, name)

    def identity(self, entry: Entry) -> tuple[Optional[int], Optional[int]]:
        """Return the UID and GID of an entry.

        A value is None if it is not set, or if the user or group does not exist yet in check mode.
        """
        found = []
        for key, look_up in (("owner", user_id), ("group", group_id)):
            name = entry[key]
            number = None if name is None else look_up(name)
            if name is not None and number is None and not self.check:
                raise Failure(f"{entry['path']}: the {key} {name} does not exist.")
            found.append(number)
        return found[0], found[1]

    def attributes(self, entry: Entry, status: os.stat_result) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the actual and the wanted owner, group and mode of a path."""
        uid, gid = self.identity(entry)
        before = {"uid": status.st_uid, "gid": status.st_gid, "mode": f"{status.st_mode & 0o7777:04o}"}
        after = {
            "uid": status.st_uid if uid is None else uid,
            "gid": status.st_gid if gid is None else gid,
            "mode": f"{int(entry['mode'], 8):04o}",
        }
        return before, after

    def set_attributes(self, entry: Entry) -> None:
        """Set the owner, group and mode of a path if they differ.

        The mode is set last, since changing the owner clears mode bits.
        """
        before, after = self.attributes(entry, os.stat(entry["path"]))
        if before == after:
            return
        self.changes(entry["path"], before, after)
        if not self.check:
            os.chown(entry["path"], after["uid"], after["gid"])
            os.chmod(entry["path"], int(after["mode"], 8))

    def directory(self, entry: Entry) -> None:
        path = entry["path"]
        if os.path.isdir(path):
            self.set_attributes(entry)
            return
        if os.path.lexists(path):
            raise Failure(f"{path} must be a directory, but is not. Move it away.")
        self.changes(path, {"state": "absent"}, {"state": "directory"})
        if self.check:
            return
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        # Other users have no access until the owner is set.
        os.mkdir(path, 0o700)
        uid, gid = self.identity(entry)
        os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
        os.chmod(path, int(entry["mode"], 8))
        self.module.set_default_selinux_context(path, False)

    def file(self, entry: Entry) -> None:
        """Write a file if its text differs. If it is staged, write the new text to a file next to it, and keep the old text."""
        path, secret = entry["path"], entry["content"] is None
        staged = path + STAGED_SUFFIX
        text: str = entry["secret_content"] if secret else entry["content"]
        before = read(path)
        if before == text:
            self.set_attributes(entry)
            if entry["staged"] and os.path.exists(staged) and not self.check:
                os.unlink(staged)
            return
        if secret:
            self.changes(path, "(a secret)" if before else "", "(another secret)")
        else:
            self.changes(path, before or "", text)
        if entry["staged"]:
            self.staged.append(path)
        if self.check:
            return
        if not os.path.isdir(os.path.dirname(path)):
            raise Failure(f"{path}: its directory does not exist.")
        uid, gid = self.identity(entry)
        replace_file(self.module, staged if entry["staged"] else path, text, int(entry["mode"], 8), uid, gid)
