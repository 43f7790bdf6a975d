"""Reads the version of a package from a lock file."""

from __future__ import annotations

import re


def locked_version(lock, package):
    """Return the version to which a lock file pins a package, or an empty string."""
    match = re.search(rf"^{re.escape(package)}(?:\[[^\]]*\])?==([^\s;\\]+)", lock, re.MULTILINE | re.IGNORECASE)
    return match.group(1) if match else ""


class FilterModule:
    def filters(self):
        return {"locked_version": locked_version}
