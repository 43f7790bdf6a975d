"""Lists the releases of an application on a host, and removes those that are no longer needed."""

from __future__ import annotations

import glob
import os
import shutil
from typing import Any

# A release without this file is incomplete. Its time is the time of the last activation.
MARKER = ".complete"


def complete_releases(directory: str, environments: str) -> list[str]:
    """Return the paths of the complete releases in a folder, from the last activated one to the first.

    A release that was built but refused before its activation has no environment file, and is not complete.
    """
    markers = glob.glob(os.path.join(directory, "*", MARKER))
    paths = [os.path.dirname(path) for path in sorted(markers, key=os.path.getmtime, reverse=True)]
    return [path for path in paths if os.path.exists(os.path.join(environments, os.path.basename(path)))]


def used_releases(directory: str, proc: str = "/proc") -> set[str]:
    """Return the paths of releases in which a process works, or from which a process maps a file.

    Empty on hosts without /proc.
    """
    used = set()
    prefix = directory + os.sep
    for process in glob.glob(os.path.join(proc, "[0-9]*")):
        paths = []
        try:
            paths.append(os.readlink(os.path.join(process, "cwd")))
            with open(os.path.join(process, "maps"), encoding="utf-8", errors="replace") as file:
                paths += [line.split(maxsplit=5)[5].rstrip("\n") for line in file if prefix in line]
        except OSError:
            # The process has ended, or belongs to another user namespace.
            pass
        used |= {prefix + path[len(prefix) :].split(os.sep, 1)[0] for path in paths if path.startswith(prefix)}
    return used


def remove_old(directory: str, environments: str, current: str, kept: int, check: bool) -> dict[str, Any]:
    """Remove all releases except the current one, those in use and the last activated ones, `kept` in total.

    Incomplete releases are not counted, and are removed. In `environments`, keep only the files of the remaining releases, and the
    previous versions of the current files. A run returns to those versions if the workers fail. Return the removed and the complete
    releases by name.
    """
    complete = complete_releases(directory, environments)
    stay = [current, *(path for path in complete if path != current)][:kept]
    keep = {*stay, *used_releases(directory)}
    removed = []
    for path in sorted(glob.glob(os.path.join(directory, "*"))):
        if path in keep:
            continue
        removed.append(os.path.basename(path))
        if not check:
            # Remove the marker first. If this run is killed, the partly removed release is then incomplete.
            if os.path.exists(os.path.join(path, MARKER)):
                os.unlink(os.path.join(path, MARKER))
            shutil.rmtree(path)
    names = {os.path.basename(path) for path in keep}
    for path in sorted(glob.glob(os.path.join(environments, "*"))):
        # RELEASE, RELEASE.KEY, or one of them with a suffix for another version of the file.
        release, *suffixes = os.path.basename(path).split(".")
        needed = release in names and "new" not in suffixes
        if "previous" in suffixes:
            needed = release == os.path.basename(current)
        if not needed and not check:
            os.unlink(path)
    return {"removed": removed, "complete": [os.path.basename(path) for path in complete if path in keep]}
