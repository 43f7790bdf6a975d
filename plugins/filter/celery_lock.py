"""What a project's lock says of its packages."""

from __future__ import annotations

import re


def locked_version(lock, package):
    """The version that a requirements lock pins a package to, or an empty string."""
    match = re.search(rf"^{re.escape(package)}(?:\[[^\]]*\])?==([^\s;\\]+)", lock, re.MULTILINE | re.IGNORECASE)
    return match.group(1) if match else ""


class FilterModule:
    def filters(self):
        return {"locked_version": locked_version}
