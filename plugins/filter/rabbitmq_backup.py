"""Checks the files of a broker's backup before a restore changes the broker."""

from __future__ import annotations

import json

# The kinds of objects that every export of a RabbitMQ broker contains.
KINDS = ("users", "vhosts", "permissions", "global_parameters")


def _series(version):
    """Return the series of a version, such as (4, 2) of 4.2.10."""
    return tuple(int(part) for part in version.split(".")[:2])


def rabbitmq_definitions_error(text, version):
    """Return why a broker of this version can't import the definitions. Return an empty string if it can."""
    try:
        found = json.loads(text)
    except ValueError:
        return "it is not JSON"
    if not isinstance(found, dict) or not all(isinstance(found.get(kind), list) for kind in KINDS):
        return f"it is no export of a broker, which contains the lists {', '.join(KINDS)}"
    origin = found.get("rabbitmq_version")
    try:
        newer = _series(origin) > _series(version)
    except (AttributeError, ValueError):
        return "its rabbitmq_version is not a version"
    return f"it is from RabbitMQ {origin}, which is newer than {version} (rabbitmq_version)" if newer else ""


def rabbitmq_configuration_error(names):
    """Return why an archive with these names is not a backup of /etc/rabbitmq. Return an empty string if it is."""
    if "rabbitmq/rabbitmq.conf" not in names:
        return "it does not contain rabbitmq/rabbitmq.conf"
    foreign = [name for name in names if name.split("/")[0] != "rabbitmq" or ".." in name.split("/")]
    return f"it contains {', '.join(foreign)}, outside of /etc/rabbitmq" if foreign else ""


class FilterModule:
    def filters(self):
        return {
            "rabbitmq_configuration_error": rabbitmq_configuration_error,
            "rabbitmq_definitions_error": rabbitmq_definitions_error,
        }
