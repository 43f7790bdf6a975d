"""The family of a host's platform, of which roles read their values and steps; a platform that they do not know is refused."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError

FAMILIES = {
    "Debian": "Debian 13 and testing, Ubuntu 24.04 and 26.04",
    "RedHat": "RHEL, Rocky Linux, AlmaLinux, CentOS Stream and Oracle Linux 9 and 10",
    "Darwin": "macOS 14, 15, 26 and 27",
}
VERSIONS = {
    # What testing calls itself until it is released.
    "Debian": ("13", "forky/sid"),
    "MacOSX": ("14", "15", "26", "27"),
    "Ubuntu": ("24.04", "26.04"),
    **dict.fromkeys(("RedHat", "Rocky", "AlmaLinux", "CentOS", "OracleLinux"), ("9", "10")),
}
OLD_EL = "its dnf can be used by Python 3.6 alone, on which Ansible no longer runs"


def platform_family(facts, *families):
    """`Debian`, `RedHat` or `Darwin`, from a host's facts (subset `distribution`); a role that knows fewer families names them."""
    families = families or tuple(FAMILIES)
    name, family = facts["distribution"], facts["os_family"]
    version = facts["distribution_version" if name == "Ubuntu" else "distribution_major_version"]
    if version in VERSIONS.get(name, ()) and family in families:
        return family
    reason = f": {OLD_EL}" if family == "RedHat" and version == "8" else ""
    known = ", ".join(FAMILIES[known] for known in families)
    raise AnsibleFilterError(f"{name} {facts['distribution_version']} is not supported{reason}. Supported are {known}.")


def platform_python(facts):
    """The name of the Python that the locks have packages for: EL 9 has 3.9 by default, macOS 3.9 too."""
    if facts["os_family"] == "Darwin":
        return "python3.13"
    is_el9 = facts["os_family"] == "RedHat" and facts["distribution_major_version"] == "9"
    return "python3.12" if is_el9 else "python3"


class FilterModule:
    def filters(self):
        return {"platform_family": platform_family, "platform_python": platform_python}
