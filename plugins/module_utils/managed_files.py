"""Manages the files of an owner.

Each file contains the owner's marker, so that the next run finds files that are no longer listed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755


def read(path: str) -> Optional[str]:
    """Return a file's text, or None if the file does not exist. Bytes that are not UTF-8 are replaced."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return None


def newest(paths: Iterable[str], packages: tuple[str, ...] = ()) -> float:
    """Return the latest modification time of the existing paths, in seconds since the epoch. 0.0 if no path exists.

    A link has its own time and, if its target is a file, the target's time. A folder's time changes with each file in it. For files
    in the folders `packages`, this function uses the change time, since rpm sets the modification time to the time of the build.
    """
    times = [0.0]
    for path in paths:
        for look in (os.lstat, os.stat):
            with contextlib.suppress(FileNotFoundError):
                status = look(path)
                if look is os.lstat or stat.S_ISREG(status.st_mode):
                    times.append(status.st_ctime if path.startswith(packages) else status.st_mtime)
    return max(times)


def replace_file(
    module: AnsibleModule, path: str, text: str, mode: int, uid: Optional[int] = None, gid: Optional[int] = None
) -> None:
    """Write a file with this text and mode atomically, regardless of the umask.

    Readers see either the old or the new text. Other users can't read the new file before its owner is set. Without `uid` or `gid`,
    an existing file keeps its owner or group.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        before = (-1, -1)
    else:
        before = (status.st_uid, status.st_gid)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".ansible-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchown(file.fileno(), before[0] if uid is None else uid, before[1] if gid is None else gid)
            os.fchmod(file.fileno(), mode)
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    module.set_default_selinux_context(path, False)


@dataclass(frozen=True)
class FirstLineMarker:
    """A comment in the first line, for formats whose comments begin with `#`."""

    owner: str

    def __str__(self) -> str:
        return f"# Managed by Ansible for {self.owner}\n"

    def put(self, text: str) -> str:
        return f"{self}{text}"

    def is_in(self, text: str) -> bool:
        return text.startswith(str(self))


@dataclass(frozen=True)
class PropertyListMarker:
    """A comment before the XML element `plist`. XML allows nothing before its declaration, and no two hyphens in a comment."""

    owner: str

    def __str__(self) -> str:
        return f"<!-- Managed by Ansible for {self.owner.replace('--', '- -')} -->\n"

    def put(self, text: str) -> str:
        return text.replace("<plist", f"{self}<plist", 1)

    def is_in(self, text: str) -> bool:
        return str(self) in text


def orphans(paths: Iterable[str], marker: Any, wanted: Collection[str]) -> list[str]:
    """Return the sorted paths of files that have the marker and are not in the list of wanted files."""
    return sorted(path for path in paths if path not in wanted and os.path.isfile(path) and marker.is_in(read(path) or ""))


class ManagedFiles:
    """Writes files, and collects the changes as entries for Ansible's diff."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.diff: list[dict[str, str]] = []

    def note(self, path: str, text: Optional[str]) -> bool:
        """Add a diff entry if the file's text differs, and return whether it differs. None means that the file must not exist."""
        before = read(path)
        if before == text:
            return False
        self.diff.append({"before_header": path, "after_header": path, "before": before or "", "after": text or ""})
        return True

    def write(self, path: str, text: str) -> None:
        """Write a file with this text and FILE_MODE atomically, regardless of the umask. Create its folder."""
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            os.makedirs(directory)
            os.chmod(directory, DIRECTORY_MODE)
        replace_file(self.module, path, text, FILE_MODE)
