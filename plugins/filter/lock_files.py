"""Reads the packages of a lock file: a requirements file with hashes, uv.lock or pylock.toml (PEP 751)."""

from __future__ import annotations

import re
import tomllib

from ansible.errors import AnsibleFilterError

TOML_LOCK = re.compile(r"^\[\[packages?\]\]$", re.MULTILINE)


def _normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _toml_packages(lock):
    """Return the packages of a uv.lock or pylock.toml, or None for a text that is neither."""
    if not TOML_LOCK.search(lock):
        return None
    content = tomllib.loads(lock)
    return content.get("package") or content.get("packages")


def _requirements(lock):
    """Return the requirements of a requirements file, one line per package. Options, such as --index-url, are left out."""
    text = re.sub(r"(^|[ \t])#.*", "", lock, flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines()]
    return [line for line in lines if line and (not line.startswith("-") or re.match(r"(-e|--editable)\b", line))]


def locked_version(lock, package):
    """Return the version to which a lock file pins a package, or an empty string."""
    packages = _toml_packages(lock)
    if packages is not None:
        versions = [entry.get("version", "") for entry in packages if _normalized(entry["name"]) == _normalized(package)]
        return next(iter(versions), "")
    pins = (re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*==\s*([^\s;]+)", line) for line in _requirements(lock))
    return next((pin[2] for pin in pins if pin and _normalized(pin[1]) == _normalized(package)), "")


def missing_in_lock(packages, lock):
    """Return the packages that a lock file does not pin."""
    return [package for package in packages if not locked_version(lock, package)]


def _hashes(package):
    """Return the sha256 hashes of a package in pylock.toml."""
    files = [*package.get("wheels", []), *(package[key] for key in ("sdist", "archive") if key in package)]
    return [file["hashes"]["sha256"] for file in files if "sha256" in file.get("hashes", {})]


def packages_without_hashes(lock):
    """Return the packages of a lock file that have no hash, as the file names them.

    uv.lock has a hash for each package of an index. uv refuses others, such as a package from git, when it installs them.
    """
    packages = _toml_packages(lock)
    if packages is None:
        return [re.split(r"[\s;]", line.removeprefix("-e "))[0] for line in _requirements(lock) if "--hash=" not in line]
    if "[[package]]" in lock:
        return []
    return [package["name"] for package in packages if not _hashes(package)]


def has_packages(lock):
    """Return whether a text is a lock file with at least one package."""
    return bool(_toml_packages(lock) or _requirements(lock))


def pylock_requirements(lock):
    """Return the packages of a pylock.toml as a requirements file with hashes.

    A pylock.toml has the URL of each file, so an installation from it would not use another package index.
    """
    lines = []
    for package in _toml_packages(lock) or []:
        marker = package.get("marker", "")
        if re.search(r"\b(extras|dependency_groups)\b", marker):
            raise AnsibleFilterError(
                f"{package['name']} in pylock.toml depends on an extra or a group. Export a file for production only."
            )
        hashes = "".join(f" \\\n    --hash=sha256:{digest}" for digest in _hashes(package))
        lines.append(f"{package['name']}=={package['version']}{f' ; {marker}' if marker else ''}{hashes}\n")
    return "".join(lines)


class FilterModule:
    def filters(self):
        return {
            "has_packages": has_packages,
            "locked_version": locked_version,
            "missing_in_lock": missing_in_lock,
            "packages_without_hashes": packages_without_hashes,
            "pylock_requirements": pylock_requirements,
        }
