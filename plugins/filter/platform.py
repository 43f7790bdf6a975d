"""Returns the OS family of a host, its Python and its CA bundle. Roles load variables and tasks by the family."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError

FAMILIES = {
    "Debian": "Debian 13 and testing, Ubuntu 24.04 and 26.04",
    "RedHat": "RHEL, Rocky Linux, AlmaLinux, CentOS Stream and Oracle Linux 9 and 10",
    "Darwin": "macOS 14, 15, 26 and 27",
}
VERSIONS = {
    # The version of Debian testing until its release.
    "Debian": ("13", "forky/sid"),
    "MacOSX": ("14", "15", "26", "27"),
    "Ubuntu": ("24.04", "26.04"),
    **dict.fromkeys(("RedHat", "Rocky", "AlmaLinux", "CentOS", "OracleLinux"), ("9", "10")),
}
CA_BUNDLES = {
    "Debian": "/etc/ssl/certs/ca-certificates.crt",
    "RedHat": "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
}
OLD_EL = "only Python 3.6 can use its dnf, and Ansible no longer runs on Python 3.6"
DEBIAN_12 = "its RabbitMQ moves to Debian 13 with playbooks/ops/migrate_rabbitmq.yml"


def platform_family(facts, *families):
    """Return `Debian`, `RedHat` or `Darwin` from a host's facts (subset `distribution`). A role may support fewer `families`."""
    families = families or tuple(FAMILIES)
    name, family = facts["distribution"], facts["os_family"]
    version = facts["distribution_version" if name == "Ubuntu" else "distribution_major_version"]
    if version in VERSIONS.get(name, ()) and family in families:
        return family
    reason = {("RedHat", "8"): f": {OLD_EL}", ("Debian", "12"): f": {DEBIAN_12}"}.get((family, version), "")
    known = ", ".join(FAMILIES[known] for known in families)
    raise AnsibleFilterError(f"{name} {facts['distribution_version']} is not supported{reason}. Supported are {known}.")


def platform_python(facts):
    """Return the name of a Python interpreter that the lock files support.

    They do not support Python 3.9, the default on EL 9 and macOS.
    """
    if facts["os_family"] == "Darwin":
        return "python3.13"
    is_el9 = facts["os_family"] == "RedHat" and facts["distribution_major_version"] == "9"
    return "python3.12" if is_el9 else "python3"


def platform_ca_bundle(facts):
    """Return the path of the file with the trusted certificate authorities. The role ca_certificates adds to them."""
    if facts["os_family"] == "Darwin":
        homebrew = "/opt/homebrew" if facts["architecture"] == "arm64" else "/usr/local"
        # The role writes this file, since macOS has no file that a program may extend.
        return f"{homebrew}/etc/ansible-ca-certificates/bundle.pem"
    # On the Red Hat family, the link /etc/pki/tls/certs/ca-bundle.crt points to this file.
    return CA_BUNDLES[facts["os_family"]]


class FilterModule:
    def filters(self):
        return {
            "platform_ca_bundle": platform_ca_bundle,
            "platform_family": platform_family,
            "platform_python": platform_python,
        }
